"""``fairseq-clinic`` by its command line: files, verdicts, the report, and what it says when something is wrong."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from fairseq import admin
from fairseq.checkpoint import load_model
from fairseq.cli import clinic
from fairseq.clinic import check, figures
from fairseq.clinic.results import save_result
from fairseq.clinic.subjects import split_paths
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests.test_transformer import tiny
from tests.toys import write_toy_checkpoint
from tests.training_runs import assert_fails, command_line, last, train

NARROW = shlex.split(
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2 --decoder-attention-heads 2"
)
SMALL = ["--encoder-layers", "2", "--decoder-layers", "2", *NARROW]
OMEGA = admin.OmegaProfile([1.0, 1.25], [1.0, 1.5, 1.75])  # of a 1L-1L model
AWKWARD = "a<b>&\"c' $d_$"


def measure(command: str, databin: Path, out: Path, *flags: object) -> dict[str, Any]:
    """Run a command on small models; returns the data of the results that it wrote, by name."""
    shape = [] if "--path" in flags else NARROW if command == "stability" else SMALL
    usual = ["--cpu", "--max-tokens", "128", "--out-dir", str(out)]
    clinic.main([command, str(databin), *shape, *usual, *map(str, flags)])
    return results(out)


def results(out: Path) -> dict[str, Any]:
    """Strictly read: NaN and Infinity, which Python writes, are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = {path.stem: json.loads(path.read_text(), parse_constant=refuse) for path in out.glob("*.json")}
    assert {path.stem for path in out.glob("*.png")} == set(found)
    return {name: result["data"] for name, result in found.items()}


def assert_picture(path: Path) -> None:
    image = imread(path)
    assert min(image.shape[:2]) > 300
    assert 0.005 < (image[..., :3].min(-1) < 0.9).mean() < 0.9  # neither blank nor black


@pytest.fixture(scope="module")
def adaptive_run(toy_databin, tmp_path_factory) -> Path:
    """A directory where a 1L-1L Admin model was trained for some updates, from the omega file OMEGA."""
    directory = tmp_path_factory.mktemp("run = 1")
    OMEGA.save(directory / "omega")
    flags = ("--init-type", "adaptive", "--omega-file", directory / "omega", "--lr", "0.05")
    train(toy_databin, directory, *flags, "--max-update", 7, "--disable-validation")
    return directory


# -- measurements


def test_dependency(toy_databin, tmp_path, capsys):
    data = measure("dependency", toy_databin, tmp_path, "--seeds", "1,2")
    assert set(data) == {"dependency-encoder", "dependency-decoder"}
    for stack, sublayers in (("encoder", 4), ("decoder", 6)):
        result = data[f"dependency-{stack}"]
        assert [(m["label"], m["stage"]) for m in result["models"]] == [
            *(("Post-LN", "at the start"), ("Pre-LN", "at the start"), ("Admin", "at the start"))
        ]
        for model in result["models"]:
            assert [len(row) for row in model[stack]["beta2"]] == list(range(2, sublayers + 2))
            assert all(sum(row) == pytest.approx(1) for row in model[stack]["beta2"])
        assert_picture(tmp_path / f"dependency-{stack}.png")
    assert capsys.readouterr().out.count("from its own branch") == 3


def test_dependency_is_the_mean_over_seeds_and_the_same_again(toy_databin, tmp_path):
    one, two, both, again = (
        measure("dependency", toy_databin, tmp_path / name, "--seeds", seeds, "--models", "deepnet")
        for name, seeds in (("one", "1"), ("two", "2"), ("both", "1,2"), ("again", "1,2,2"))
    )
    assert both == again
    rows = [run["dependency-decoder"]["models"][0]["decoder"]["beta2"][-1] for run in (one, two, both)]
    assert rows[0] != rows[1]
    assert [(a + b) / 2 for a, b in zip(rows[0], rows[1], strict=True)] == pytest.approx(rows[2])


def test_dependency_of_checkpoints(toy_databin, tmp_path, adaptive_run):
    """The file's own path has spaces and an equals sign in it."""
    checkpoint = adaptive_run / "checkpoint_last.pt"
    data = measure("dependency", toy_databin, tmp_path, "--path", f"{AWKWARD}={checkpoint}:{checkpoint}")
    models = data["dependency-encoder"]["models"]
    assert [(m["label"], m["stage"]) for m in models] == [
        *((AWKWARD, "at the start"), (AWKWARD, "trained"), ("Admin", "at the start"), ("Admin", "trained"))
    ]
    start, trained, *same = [model["encoder"] for model in models]
    assert same == [start, trained]
    assert set(start["bias"]) == {0} and min(trained["bias"]) > 0
    assert start["beta2"] != trained["beta2"]
    assert_picture(tmp_path / "dependency-encoder.png")


def test_stability(toy_databin, tmp_path):
    flags = ("--depths", "2,4,6", "--seeds", "1,2", "--models", "post-ln,rezero", "--name", "depth")
    first, again = (measure("stability", toy_databin, tmp_path / name, *flags) for name in ("first", "again"))
    assert first == again and set(first) == {"depth"}
    post_ln, rezero = first["depth"]["models"]
    assert (post_ln["label"], rezero["label"]) == ("Post-LN", "ReZero")
    for kind in ("random", "step"):
        assert [len(seeds) for seeds in post_ln[kind]] == [2, 2, 2]
        assert rezero[f"{kind}_mean"] == [0, 0, 0] and rezero["fits"][kind]["exponent"] is None
        assert post_ln["fits"][kind]["exponent"] > 0.2
    assert_picture(tmp_path / "first" / "depth.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a legend without entries gives one
        figures.stability([rezero])


def test_gradients(toy_databin, tmp_path):
    data = measure("gradients", toy_databin, tmp_path, "--seeds", "1", "--models", "post-ln,subln,b2t")
    assert [model["label"] for model in data["gradients"]["models"]] == ["Post-LN", "Sub-LN", "B2T"]
    for model in data["gradients"]["models"]:
        for stack, kinds in (("encoder", ["self_attn", "ffn"]), ("decoder", ["self_attn", "encoder_attn", "ffn"])):
            assert model[stack]["kind"] == kinds * 2
            assert min(model[stack]["parameters"] + model[stack]["output"]) > 0
    assert_picture(tmp_path / "gradients.png")


def test_gradients_of_a_checkpoint(toy_databin, tmp_path, adaptive_run):
    data = measure("gradients", toy_databin, tmp_path, "--seeds", "1", "--path", adaptive_run / "checkpoint_last.pt")
    start, trained = data["gradients"]["models"]
    assert (start["label"], trained["label"]) == ("Admin, at the start", "Admin, trained")
    assert start["encoder"]["parameters"] != trained["encoder"]["parameters"]


def test_omega(tmp_path, adaptive_run, capsys):
    checkpoint = adaptive_run / "checkpoint_last.pt"
    clinic.main(["omega", f"trained={checkpoint}", str(adaptive_run / "omega"), "--out-dir", str(tmp_path)])
    trained, file = results(tmp_path)["omega"]["models"]
    assert (trained["label"], file["label"]) == ("trained", "omega")
    state = last(adaptive_run)["model"]
    names = {"encoder": ("attention_ratio_change", "fc_ratio_change")}
    names["decoder"] = ("self_ratio_change", "encoder_ratio_change", "fc_ratio_change")
    for stack, values in OMEGA.to_dict().items():
        assert trained[stack]["start"] == file[stack]["start"] == values
        assert file[stack]["mean"] is None
        for i, name in enumerate(names[stack]):
            vector = sorted(state[f"{stack}.layers.0.{name}"].tolist())
            mean = sum(vector) / 16
            std = math.sqrt(sum((value - mean) ** 2 for value in vector) / 16)
            expected = {"mean": mean, "std": std, "least": vector[0], "most": vector[-1]}
            assert {key: trained[stack][key][i] for key in expected} == pytest.approx(expected)
            assert std > 0
    assert_picture(tmp_path / "omega.png")
    assert len(figures.omega([trained] * 12).axes[0].lines) == 12  # more than there are colours
    printed = capsys.readouterr().out
    assert "1.7500" in printed and f"{trained['encoder']['mean'][1]:.4f}" in printed


# -- the verdict on a training command

FINE = "fine, with a learning rate that suits 6 layers"


def diagnosis(capsys: pytest.CaptureFixture[str], databin: Path, layers: int, *flags: object) -> tuple[int, list[str]]:
    """Exit status and printed lines for a model of ``layers`` encoder and decoder layers."""
    depth = ("--encoder-layers", layers, "--decoder-layers", layers, "--max-tokens", 64)
    with pytest.raises(SystemExit) as exit_info:
        clinic.main(["check", *command_line(databin, databin / "nowhere", *depth, *flags)])
    assert not (databin / "nowhere").exists()
    return int(exit_info.value.code or 0), capsys.readouterr().out.splitlines()


def test_check_of_a_shallow_model(toy_databin, capsys):
    status, lines = diagnosis(capsys, toy_databin, 2)
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    model = Transformer(TransformerConfig(**shape, encoder_attention_heads=2, decoder_attention_heads=2), 32, 32)
    assert (status, lines[-1]) == (0, f"verdict: {FINE}")
    assert lines[0] == f"model: Post-LN, 2L-2L, {sum(p.numel() for p in model.parameters()):,} parameters"
    tokens = int(re.search(r"the first batch, (\d+) target tokens", lines[1])[1])  # type: ignore[index]
    assert 32 < tokens <= 64
    assert lines[3].startswith("learning rate: the verdict leaves out yours, 0.01 after 5 updates of warm-up. Known: ")


@pytest.mark.slow
def test_check_of_deep_models(toy_databin, capsys):
    status, lines = diagnosis(capsys, toy_databin, 18)
    failing = "will probably diverge or stall; use --init-type adaptive, or a lower --lr"
    assert (status, lines[-1]) == (1, f"verdict: {failing}")
    status, lines = diagnosis(capsys, toy_databin, 18, "--init-type", "adaptive")
    assert (status, lines[-1]) == (0, f"verdict: {FINE}")


def test_check_says_what_it_does_not_know(toy_databin, capsys):
    """ReZero starts as the identity, whose output no perturbation moves."""
    status, lines = diagnosis(capsys, toy_databin, 2, "--init-type", "rezero")
    assert (status, lines[2][:34], lines[-1][:18]) == (0, "output change at the start: 0.00 t", "verdict: not known")


def test_check_near_the_limit():
    close = check.Diagnosis("B2T", (8, 8), 1, 1, 1, 1, change=check.THRESHOLD, reference=1.0, lr=1e-3, warmup=9)
    assert close.trains and close.verdict.startswith("near the limit, may train poorly; --init-type adaptive or fewer")


def test_check_reads_the_training_flags(toy_databin, tmp_path, capsys):
    """The optimiser's state counts; the batch is the one that training would start with."""
    shape = {"encoder_embed_dim": 1536, "encoder_ffn_embed_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    model = Transformer(TransformerConfig(**shape, encoder_attention_heads=2, decoder_attention_heads=2), 32, 32)
    parameters = sum(p.numel() for p in model.parameters())
    for flags, count in ((("--optimizer", "adam"), 16), (("--optimizer", "sgd"), 8)):
        _, lines = diagnosis(capsys, toy_databin, 1, "--encoder-embed-dim", 1536, *flags)
        assert f" {parameters * count / 2**20:.0f} MiB parameters, gradients and optimiser" in lines[1]
    argv = command_line(toy_databin, tmp_path, "--max-tokens", 64)
    assert_fails(capsys, 1, "--max-target-positions 2", "check", *argv, "--max-target-positions", 2, main=clinic.main)
    assert_fails(capsys, 1, "other", "check", *argv, "--train-subset", "other", main=clinic.main)


@pytest.mark.parametrize("flags", [("--no-such-flag",), ("--init-type", "nope"), ("--max-tokens", "x")])
def test_check_usage(toy_databin, tmp_path, capsys, flags):
    assert_fails(capsys, 2, flags[0], "check", *command_line(toy_databin, tmp_path, *flags), main=clinic.main)


# -- the report


class Page(HTMLParser):
    """What a browser would load, and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("srcset", "data", "action", "poster")
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "src":
                assert tag == "img"
                self.pictures.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["td"]:
            self.cells.append(data)
        elif self.tags[-1:] == ["h2"] and data.strip():
            self.titles.append(data.strip())


def test_report(toy_databin, tmp_path, adaptive_run):
    checkpoint = f"{AWKWARD}={adaptive_run / 'checkpoint_last.pt'}"
    measure("dependency", toy_databin, tmp_path, "--path", checkpoint, "--seeds", "1", "--name", "p<q&r")
    measure("gradients", toy_databin, tmp_path, "--seeds", "1")
    measure("stability", toy_databin, tmp_path, "--depths", "2,4,6", "--seeds", "1", "--models", "pre-ln,rezero")
    clinic.main(["omega", checkpoint, str(adaptive_run / "omega"), "--out-dir", str(tmp_path)])
    clinic.main(["report", "--out-dir", str(tmp_path)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    names = ["p<q&r-encoder", "p<q&r-decoder", "stability", "gradients", "omega"]
    assert page.titles[:3] == ["Layer dependency, encoder: p<q&r", "Layer dependency, decoder: p<q&r", "Output change"]
    assert page.ids == names and page.links == [f"#{name}" for name in names]
    assert {*page.tags} & {"script", "link", "iframe", "object", "base", "b"} == set()
    assert "url(" not in text and "@import" not in text
    assert len(page.pictures) == len(names)
    for name, picture in zip(names, page.pictures, strict=True):
        prefix, _, data = picture.partition(",")
        assert prefix == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / f"{name}.png").read_bytes()
    assert page.cells.count(f"{AWKWARD}, trained") == 2 and f"{AWKWARD}, encoder" in page.cells
    assert AWKWARD not in text and "p<q" not in text
    own = results(tmp_path)["p<q&r-encoder"]["models"][1]["encoder"]["beta2"][-1][-1]
    assert f"{own:.4g}" in page.cells


LARGE = {"label": "a", "stage": "trained", "encoder": {"beta2": [[0.5], [10**400]], "bias": [0.1]}}


@pytest.mark.parametrize(
    "content",
    [
        *(
            None,
            "{",
            "[1]",
            '{"version": 3}',
            '{"kind": "omega", "data": 3}',
            '{"kind": "omega", "data": {"models": [1]}}',
        ),
        json.dumps({"kind": "dependency", "data": {"stack": "encoder", "models": [LARGE]}}),
    ],
    ids=range(7),
)
def test_report_on_what_is_no_result(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "tsconfig.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    message = "no results" if content is None else "tsconfig.json"
    assert_fails(capsys, 1, message, "report", "--out-dir", tmp_path, main=clinic.main)
    assert sorted(tmp_path.iterdir()) == before


def test_report_names_files_that_are_no_utf8(tmp_path):
    """Python reads such a name from the command line as half of a surrogate pair."""
    omega = {"start": [1.0, 2.0], "mean": None, "std": None}
    data = {"models": [{"label": "a\udcff", "encoder": omega, "decoder": omega}]}
    save_result(tmp_path, "omega", "omega", "fairseq-clinic omega 'b\udcff'", data, None)
    clinic.main(["report", "--out-dir", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r"a\udcff, encoder" in page and r"omega &#x27;b\udcff&#x27;" in page


def test_omega_of_a_file_whose_name_is_no_utf8(tmp_path, capsys):
    path = os.fsdecode(bytes(tmp_path) + b"/a\xff")
    Path(path).write_text("1 1.5\n2 1.0\n1 1.0\n2 1.0\n3 1.0\n")
    clinic.main(["omega", path, "--out-dir", str(tmp_path)])
    assert r"a\udcff" in capsys.readouterr().out
    assert results(tmp_path)["omega"]["models"][0]["label"] == r"a\udcff"


# -- usage


@pytest.mark.parametrize("command", ["", *clinic.COMMANDS])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        clinic.main([*filter(None, [command]), "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fairseq-clinic {command}".strip())
    for name in clinic.COMMANDS:
        assert command or name in printed


@pytest.mark.parametrize(
    ("status", "message", "argv"),
    [
        (2, "COMMAND", ""),
        (2, "'nope'", "nope BIN"),
        (2, "--no-such", "dependency BIN --no-such"),
        (2, "--seeds", "gradients BIN --seeds 1,x"),
        (2, "--depths", "stability BIN --depths 6,x,12"),
        (2, "--depths", "stability BIN --depths 0,2,4"),
        (2, "--depths", "gradients BIN --depths 2,4,6"),
        (2, "--path", "stability BIN --path x.pt"),
        (2, "--encoder-layers", "stability BIN --encoder-layers 3"),
        (2, "--models does nothing with --path", "dependency BIN --path x.pt --models post-ln"),
        (2, "--dropout does nothing with --path", "gradients BIN --path x.pt --dropout 0.1"),
        (2, "--name a/b: a name", "gradients BIN --name a/b"),
        (2, "--name a/b: a name", "omega nowhere.pt --name a/b"),
        (1, "--depths", "stability BIN --depths 6,7,12"),
        (1, "--depths", "stability BIN --depths 6,12,12"),
        (1, "unknown model 'nope'", "dependency BIN --models post-ln,nope"),
        (1, "unknown model ''", "gradients BIN --models post-ln,"),
        (1, "unknown model 'nope'", "stability BIN --models nope"),
        (1, "called the same", "dependency BIN --models post-ln,post-ln"),
        (1, "no such data-bin", "gradients nowhere"),
        (1, "nowhere.pt", "dependency BIN --path nowhere.pt"),
        (1, "nowhere.pt", "omega nowhere.pt"),
        (1, "train.xx-yy.yy", "omega BIN/train.xx-yy.yy.bin"),
        (1, "--encoder-attention-heads", "dependency BIN --encoder-embed-dim 15"),
        (2, "--models: expected one argument", "stability BIN --models"),
        (2, "--user-dir: expected one argument", "gradients BIN --user-dir"),
        (2, "--criterion: expected one argument", "check BIN --criterion"),
        (2, "--max-tokens", "check BIN"),
        (1, "--max-tokens", "check BIN --batch-size 8 --optimizer adam"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(toy_databin, tmp_path, capsys, monkeypatch, status, message, argv):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("BIN", str(toy_databin)) for word in shlex.split(argv)]
    assert_fails(capsys, status, message, *words, main=clinic.main)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_dictionaries(toy_databin, tmp_path, capsys):
    write_toy_checkpoint(tiny(), tmp_path / "other.pt")
    argv = ("dependency", toy_databin, "--path", tmp_path / "other.pt", "--out-dir", tmp_path / "out")
    assert_fails(capsys, 1, "20 entries", *argv, main=clinic.main)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_an_empty_omega(tmp_path, adaptive_run, capsys):
    state = torch.load(adaptive_run / "checkpoint_last.pt", weights_only=False)
    name = next(name for name in state["model"] if name.endswith("ratio_change"))
    state["model"][name] = torch.zeros(0)
    torch.save(state, tmp_path / "empty.pt")
    assert_fails(capsys, 1, "empty", "omega", tmp_path / "empty.pt", "--out-dir", tmp_path / "out", main=clinic.main)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_short_sentences(toy_databin, tmp_path):
    """Sentences that a model has no positions for are left out."""
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    cfg = TransformerConfig(**shape, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=6)
    checkpoint = write_toy_checkpoint(Transformer(cfg, 32, 32), tmp_path / "short.pt")
    assert load_model(checkpoint).encoder.embed_positions.weight.size(0) == 8
    measure("dependency", toy_databin, tmp_path, "--path", checkpoint, "--seeds", "1,2,3")


def test_labels_with_a_colon(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    parts = [f"lr: 1={tmp_path}/a.pt", f"{tmp_path}/b.pt", "nowhere.pt"]
    assert split_paths(":".join(parts)) == parts
