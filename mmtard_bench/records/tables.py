"""Records side by side, as tables for a terminal. Imports without torch."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from mmtard_bench.records.recall import CUTOFFS, Recalls
from mmtard_bench.records.schema import Record
from mmtard_bench.records.worst import is_complete, worst_cases

RECALL_HEADERS = ("query", *(f"R@{k}" for k in CUTOFFS), *(f"attacked R@{k}" for k in CUTOFFS))
"""What ``recall_cells`` gives."""


def percent(value: float) -> str:
    """0.583 -> "58.3"."""
    return f"{100 * value:.1f}"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """An accuracy in percent with its interval: "58.3 [53.9, 62.5]"."""
    return f"{percent(value)} [{percent(interval[0])}, {percent(interval[1])}]"


def table_of(records: Sequence[Record]) -> str:
    """A run for the terminal: accuracies in percent with 95% intervals, cost, flags, errors."""
    rows = [_row(record) for record in records]
    worst = worst_cases(records) if is_complete(records) else []
    rows += [
        [w.task, f"worst case {w.ball}", "", with_interval(w.accuracy, w.interval), "", "", ""]
        for w in worst
        if w.threats > 1
    ]
    headers = ["task", "threat model", "clean %", "robust %", "forward", "backward", "seconds"]
    text = tabulate(rows, headers=headers, disable_numparse=True)
    rows = [
        [record.task.name, record.threat.name, *cells]
        for record in records
        if record.results and record.results.recalls
        for cells in recall_cells(record.results.recalls)
    ]
    if rows:
        headers = ["task", "threat model", *RECALL_HEADERS]
        text += f"\n\n{tabulate(rows, headers=headers, disable_numparse=True)}"
    remarks = list(_remarks(records))
    return "\n".join([text, "", *remarks]) if remarks else text


def recall_cells(recalls: Recalls) -> list[list[str]]:
    """Recalls in percent, a row a direction."""
    return [
        ["image to text", *map(percent, recalls.image_to_text + recalls.image_to_text_attacked)],
        ["text to image", *map(percent, recalls.text_to_image + recalls.text_to_image_attacked)],
    ]


def _row(record: Record) -> list[str]:
    results = record.results
    accuracies = ["-", "FAILED", "-", "-"]
    if results is not None:
        accuracies = [
            with_interval(results.clean_accuracy, results.clean_interval),
            with_interval(results.robust_accuracy, results.robust_interval),
            f"{results.forward_per_sample:.0f}",
            f"{results.backward_per_sample:.0f}",
        ]
    return [record.task.name, record.threat.name, *accuracies, f"{record.seconds:.1f}"]


def _remarks(records: Sequence[Record]) -> Iterable[str]:
    said: dict[str, str] = {}
    for record in records:
        where = f"{record.task.name}, {record.threat.name}"
        if record.error is not None:
            said[f"error: {record.error}"] = where
        for flag in record.flags:
            said.setdefault(f"flag {flag.code}: {flag.detail}", where)
        for note in record.notes:
            said.setdefault(f"note: {note}", where)
    return (f"{text} ({where})" for text, where in said.items())
