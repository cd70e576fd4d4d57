"""What ``raydiff submit`` sends, how it rewrites a command line, and what it refuses before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from raydiff.cli import main
from raydiff.cli.submit import _name, remedy_in_a_job
from raydiff.cli.submit_command import moved, shown
from raydiff.cli.submit_files import Upload
from raydiff.errors import ConfigError, DataError

DIGITS = "training: {num_steps: 20}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with configs, ignored runs and some data; the working folder of the test."""
    files = {
        "configs/digits.yaml": DIGITS,
        ".gitignore": "runs/\n*.tmp\n",
        "runs/screw/artifact/config.json": "{}",
        "runs/screw/notes.tmp": "x",
        "parts/train/good/0.png": "x" * 3000,
        "parts/.gitignore": "!keep.tmp\n/cache\n",
        "parts/keep.tmp": "x",
        "parts/drop.tmp": "x",
        "parts/cache/big": "x" * 100_000,
        "parts/train/cache/small": "x",
    }
    for name, content in files.items():
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(content)
    monkeypatch.chdir(tmp_path / "project")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "project"


def sent(*command: str, include: tuple[str, ...] = ()) -> tuple[list[str], Upload, list[str]]:
    """The command line of the job, what goes along, and what was said."""
    upload, said = Upload(Path.cwd()), list[str]()
    for path in include:
        upload.add(path)
    return moved(main, command, upload, notice=said.append), upload, said  # type: ignore[arg-type]


def refused(*command: str, include: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        sent(*command, include=include)
    return str(caught.value)


def test_the_files_that_a_command_names_are_sent_and_nothing_else(project: Path) -> None:
    line, upload, _ = sent("fit", "configs/digits.yaml", "--out", "/shared/digits")
    assert line == ["fit", "configs/digits.yaml", "--out", "/shared/digits"]
    assert set(upload.files) == {"configs/digits.yaml"}
    assert upload.describe() == "1 file, 26 B: configs/digits.yaml"
    assert set(sent("serve", "/shared/runs/screw")[1].files) == set()


def test_a_file_elsewhere_and_one_by_its_full_path_get_a_name_in_the_job(project: Path) -> None:
    (project.parent / "other.yaml").write_text(DIGITS)
    line, upload, _ = sent("fit", "../other.yaml", "--out", "/shared/x")
    assert line == ["fit", "outside/other.yaml", "--out", "/shared/x"]
    assert upload.files == {"outside/other.yaml": project.parent / "other.yaml"}
    full = str(project / "configs/digits.yaml")
    assert sent("fit", f"{project}/./configs/digits.yaml", "--out", "/shared/x")[0][1] == "configs/digits.yaml"
    line, upload, _ = sent("sweep", "../other.yaml", f"--config={full}", "--out", "/shared/x")
    assert line[1:3] == ["outside/other.yaml", "--config=configs/digits.yaml"]


def test_ignored_files_are_left_out_unless_they_are_named(project: Path) -> None:
    _, upload, _ = sent("evaluate", "/shared/run", include=("parts",))
    assert set(upload.files) == {"parts/keep.tmp", "parts/train/good/0.png", "parts/train/cache/small"}
    _, everything, _ = sent("evaluate", "/shared/run", include=(".",))
    assert not any(name.startswith("runs/") for name in everything.files)
    line, named, _ = sent("evaluate", "./runs/screw", include=("runs/screw",))
    assert line == ["evaluate", "runs/screw"]
    assert set(named.files) == {"runs/screw/artifact/config.json", "runs/screw/notes.tmp"}


@pytest.mark.parametrize("include", [(".", "runs/screw"), ("runs/screw", ".")])
def test_what_is_named_is_sent_beside_the_folder_that_ignores_it(project: Path, include: tuple[str, ...]) -> None:
    line, upload, _ = sent("evaluate", "runs/screw", include=include)
    assert line == ["evaluate", "runs/screw"]
    assert {"runs/screw/artifact/config.json", "runs/screw/notes.tmp", "parts/keep.tmp"} < set(upload.files)
    assert not any(name.endswith(".gitignore") for name in upload.files)  # Ray would heed it


def test_a_command_may_name_a_file_that_is_ignored(project: Path) -> None:
    (project / "my.tmp").write_text(DIGITS)
    line, upload, _ = sent("fit", "my.tmp", "--out", "/shared/x", include=(".",))
    assert line[1] == "my.tmp"
    assert {"my.tmp", "configs/digits.yaml"} < set(upload.files)
    assert ".gitignore" not in upload.files
    outside = project.parent / "more"
    outside.mkdir()
    (outside / ".gitignore").write_text("*.tmp")
    (outside / "my.tmp").write_text(DIGITS)
    line, upload, _ = sent("fit", "../more/my.tmp", "--out", "/shared/x", include=("../more",))
    assert (line[1], set(upload.files)) == ("outside/more/my.tmp", {"outside/more/my.tmp"})


def test_what_is_ignored_in_a_folder_that_is_sent_is_not_taken_for_sent(project: Path) -> None:
    assert "send it with --include runs/screw" in refused("evaluate", "runs/screw", include=(".",))


def test_too_much_is_refused_and_the_largest_is_named(project: Path) -> None:
    upload = Upload(project)
    upload.add("parts/train")
    upload.check(1)
    with pytest.raises(
        ConfigError, match=r"3.0 kB to send, more than --max-upload-mb 0.001; the largest: parts/train/good"
    ):
        upload.check(0.001)


def test_what_is_written_is_what_was_described(project: Path, tmp_path: Path) -> None:
    upload, other = Upload(project), Upload(project)
    upload.add("parts")
    other.add("parts")
    target = tmp_path / "target"
    target.mkdir()
    upload.write(target)
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert written - {".raydiff"} == set(upload.files)
    assert (target / "parts/train/good/0.png").read_text() == "x" * 3000
    before = upload.digest()
    assert before == other.digest()
    (project / "parts/keep.tmp").write_text("y")
    assert upload.digest() != before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["demo"], "demo: is no command that runs as a job; there are: fit, evaluate, score"),
        (["fit", "configs/digits.yaml"], "fit needs --out in a job"),
        (["fit", "configs/digits.yaml", "--out", "runs/x"], "--out runs/x: is relative, and a job's folder"),
        (["fit", "--resume", "runs/x"], "--resume runs/x: is relative"),
        (["fit", "configs/nothing.yaml", "--out", "/x"], "configs/nothing.yaml: no such file or folder to send"),
        (["fit", "configs/digits.yaml", "--out", "/x", "--set", "trainning.num_steps=1"], "trainning"),
        (["fit", "configs/digits.yaml", "--out", "/x", "--set", "data.shards=x"], "data.shards x: is relative"),
        (["fit", "configs/digits.yaml", "--out", "/x", "--set", "data.spaces=x"], "data.spaces x: is relative"),
        (["prepare", "digits"], "prepare needs --out in a job"),
        (["prepare", "folder", "--source", "parts", "--out", "/x"], "source parts: is relative and not sent"),
        (["score", "runs/screw", "/images", "--out", "/x/"], "send it with --include runs/screw"),
        (["score", "/run", "/images", "--out", "scores.csv"], "--out scores.csv: is relative"),
        (["serve", "runs/screw"], "send it with --include runs/screw"),
    ],
)  # fmt: skip
def test_what_could_not_work_in_a_job_is_refused(project: Path, command: list[str], said: str) -> None:
    assert said in refused(*command)


def test_data_on_this_machine_is_named(project: Path) -> None:
    command = ["prepare", "folder", "--source", str(project / "parts"), "--out", "/x"]
    assert sent(*command)[2] == [f"data.dataset.source {project}/parts: is not sent; every node must have it there"]
    line, upload, said = sent("prepare", "folder", "--source", "parts", "--out", "/x", include=("parts",))
    assert line[3] == "parts"
    assert "parts/train/good/0.png" in upload.files
    assert not said


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["submit", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_the_command_line_names_what_is_wrong(project: Path) -> None:
    fit = ["--", "fit", "configs/digits.yaml", "--out", "/x"]
    assert run() == (2, run()[1])
    assert "give a command after --" in run()[1]
    assert "give a command after --" in run("--list", *fit)[1]
    code, output = run(*fit)
    assert (code, "no cluster is named; give --address http://HEAD:8265" in output) == (2, True)
    code, output = run("--env", "NOT_SET_HERE", *fit)
    assert (code, "--env NOT_SET_HERE: is not set here" in output) == (2, True)
    code, output = run("--address", "ray://head:10001", *fit)
    assert (code, "jobs go to the dashboard, most likely --address http://head:8265" in output) == (2, True)
    code, output = run("--address", "http://127.0.0.1:9", *fit)
    assert (code, "http://127.0.0.1:9: no Ray dashboard answers" in output) == (1, True)
    code, output = run("--", "fit", "--steps", "3")
    assert (code, "No such option" in output) == (2, True)


def test_in_a_job_missing_data_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DataError("/home/me/parts: no such folder; set data.dataset.source to the folder of images")
    assert remedy_in_a_job(error) == str(error)
    monkeypatch.setenv("RAYDIFF_SUBMITTED_BY", "0.1.0 abc")
    assert "write it as shards to s3://" in remedy_in_a_job(error)
    assert remedy_in_a_job(DataError("x.png: is truncated")) == "x.png: is truncated"


@pytest.mark.parametrize(
    "secret",
    [
        "s3://KEY:SECRET@bucket/runs/x",
        "s3://KEY:SECRET@bucket",
        "s3://KEY:SEC/RET@bucket",
        "postgresql://u:SECRET@db/x",
    ],
)
def test_keys_in_a_command_are_told_and_not_shown(project: Path, secret: str) -> None:
    said = sent("evaluate", secret)[2]
    assert len(said) == 1
    assert said[0].startswith(
        "Warning: a URI in this command seems to hold a key or password; who can read the dashboa"
    )
    assert "SEC" not in said[0] + shown(f"raydiff evaluate {secret}") + _name(["evaluate", secret])
    assert "KEY" not in _name(["evaluate", secret])


def test_a_command_without_keys_is_shown_as_it_is(project: Path) -> None:
    command = "fit configs/digits.yaml --out s3://bucket/x --set data.shards=gs://bucket:80/y"
    assert shown(command) == command
    assert sent("evaluate", "s3://bucket/run")[2] == []
    assert shown("--storage postgresql://me:pass@db:5432/x --out s3://K:S@b/x") == (
        "--storage postgresql://...@db:5432/x --out s3://...@b/x"
    )
