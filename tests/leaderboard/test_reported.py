"""Figures of others: read strictly, shown apart, never ranked."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.markdown import render
from mmtard_bench.leaderboard.reported import read_reported, reported_section
from tests.conftest import REPOSITORY
from tests.leaderboard.test_leaderboard import made

HEAD = "protocol,model,hub,backbone,method,train_eps,metric,threat,eps,value,source\n"
CLEAN = "tecoa-v1,m,,ViT-B-32,TeCoA,1/255,average,clean,,60.0,a paper\n"
ROBUST = "tecoa-v1,m,,ViT-B-32,TeCoA,1/255,average,pgd,1/255,38.18,a paper\n"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "reported.csv"
    path.write_text(HEAD + "".join(lines))
    return path


def test_figures_stand_below_the_records_and_out_of_the_ranking(tmp_path):
    reported = read_reported(written(tmp_path, CLEAN, ROBUST))
    text = render(Board(loose=[made("rrbb")], reported=reported))
    ours, _, theirs = text.partition("## Reported by others")
    assert ours == render(Board(loose=[made("rrbb")])) + "\n"
    row = next(line for line in theirs.splitlines() if line.startswith("| m "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:8] == ["1/255", "reported", "60.0", "38.18"]


def test_each_protocol_and_metric_has_its_own_table(tmp_path):
    other = CLEAN.replace("tecoa-v1", "robustvlm-v1")
    third = CLEAN.replace("average", "worst task")
    text = reported_section(read_reported(written(tmp_path, CLEAN, other, third)))
    assert text.count("### ") == 3
    assert reported_section([]) == ""


def test_the_shipped_figures_are_read_as_they_were_published():
    rows = read_reported(REPOSITORY / "leaderboard" / "reported.csv")
    assert len(rows) == 53
    (robust,) = (r for r in rows if r.model == "fare2" and r.column == "apgd-pair-5r 2/255")
    assert (str(robust.value), robust.hub) == ("43.1", "chs20/fare2-clip")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (CLEAN.replace("60.0", "160.0"), "value"),
        (CLEAN.replace("60.0", "nan"), "value"),
        (CLEAN.replace("tecoa-v1", "tecoa-v9"), "tecoa-v1"),
        (CLEAN.replace("a paper", ""), "source"),
        (ROBUST.replace("pgd,1/255", "pgd,"), "an attack needs an eps"),
        (ROBUST.replace("1/255,38", "0.004,38"), "eps"),
        (CLEAN + CLEAN, "an earlier line has the figure"),
        (CLEAN.strip() + ",more\n", "line 2"),
        ("tecoa-v1,m\n", "line 2"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path, line, said):
    with pytest.raises(InputError, match=said):
        read_reported(written(tmp_path, line))


def test_the_command_reads_the_file_beside_the_records(tmp_path):
    (tmp_path / "entries").mkdir()
    command = [sys.executable, "-m", "mmtard_bench", "leaderboard", "--output", "page.md"]
    command += ["--records", "entries"]
    written(tmp_path, CLEAN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tecoa-v1, average (reported)" in (tmp_path / "page.md").read_text()
    missing = [*command, "--reported", "none.csv"]
    done = subprocess.run(missing, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.csv" in done.stderr
    assert "Traceback" not in done.stderr
