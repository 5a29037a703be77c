"""Make the models that ship with the package: pretraining, text tables, rounding to float16."""
