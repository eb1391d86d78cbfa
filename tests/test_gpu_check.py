"""scripts/gpu_check.py: a stage that fails or hangs is told, and takes nothing with it."""

from __future__ import annotations

import json
import sys

from tests.training_runs import load_script


def test_stages_fail_alone(tmp_path):
    script = load_script("gpu_check")
    rows = tmp_path / "rows.json"
    write = f"import json; json.dump([{{'wps': 5.0}}], open({str(rows)!r}, 'w')); print('made')"
    programs = {"good": write, "bad": "print('why'); raise SystemExit(3)", "slow": "import time; time.sleep(60)"}
    stages = [script.Stage(name, [sys.executable, "-c", code], 5, rows) for name, code in programs.items()]
    with (tmp_path / "log.txt").open("w") as log:
        for stage in stages:
            script._run(stage, 0.5 if stage.name == "slow" else 30, log)
            script._write(tmp_path, stages)
    results = {line["stage"]: line for line in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert [results[name]["result"] for name in programs] == ["ok", "FAILED with status 3", "STOPPED after 0 s"]
    assert results["good"]["rows"] == [{"wps": 5.0}]
    assert results["bad"] | {"rows": []} == results["bad"]
    assert results["bad"]["lines"] == ["why"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "wps 5" in summary and "why" in summary


def test_corpus_can_be_trained_on(tmp_path):
    from fairseq.data.translation import TranslationData
    from fairseq.options import DataConfig

    script = load_script("gpu_check")
    data = TranslationData.open(DataConfig(str(script._make_corpus(tmp_path / "bin", 50, 90))))
    assert (data.source_lang, data.target_lang) == ("de", "en")
    dataset = data.load("train")
    assert len(dataset) == 90
    tokens = dataset.src[0]
    assert max(tokens) < len(data.src_dict) and tokens[-1] == data.src_dict.eos()
