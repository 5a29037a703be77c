"""The tasks that ship with the package, by name."""

from mmtard_bench.data.digits import INK_CAPTION
from mmtard_bench.registry import register_task
from mmtard_bench.tasks.hub_tasks import TASKS
from mmtard_bench.types import Task

DIGIT_TEMPLATE = "a photo of the digit {}"

register_task(
    Task(
        name="digits/digit",
        data="digits/test",
        templates=(DIGIT_TEMPLATE,),
        description="name the digit (10 classes), over all colour combinations",
    )
)
register_task(
    Task(
        name="digits/unseen",
        data="digits/unseen",
        templates=("{}",),
        description=f"choose among the 112 captions never trained on: '{INK_CAPTION}'",
    )
)
register_task(
    Task(
        name="digits/retrieval",
        data="digits/test",
        templates=("{}",),
        metric="retrieval",
        description="find each image's caption, and each caption's images, among the samples'",
    )
)
# Images KEY.jpg with KEY.txt, a caption a line; every line is a caption, as in CLIP_benchmark
# (clip_benchmark/datasets/builder.py, build_wds_dataset). Some of COCO's images are grey.
for _name, _title in (("flickr30k", "Flickr30k"), ("mscoco_captions", "MS-COCO captions")):
    register_task(
        Task(
            name=_name,
            data=f"wds:clip-benchmark/wds_{_name}",
            templates=("{}",),
            split="test",
            label_column="txt",
            convert_rgb=True,
            metric="retrieval",
            description=f"{_title}: retrieval in both directions; surface 'model'",
        )
    )
register_task(
    Task(
        name="digits/train",
        data="digits/train",
        templates=("{}",),
        description="for training: choose among the 448 captions of training",
    )
)
register_task(
    Task(
        name="digits/validation",
        data="digits/validation",
        templates=(DIGIT_TEMPLATE,),
        description="for training: name the digit, on images like those of training",
    )
)
for _task in TASKS:
    register_task(_task)
