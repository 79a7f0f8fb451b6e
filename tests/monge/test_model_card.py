"""The card of a map: the hub reads its front, a reader its text, and its code runs."""

import json
import re

import pytest
import torch
import yaml
from map_kinds import KINDS, model_of
from monge_runs import gaussians, small, trainer

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ConditionalMap, EntropicMap, ResidualMLP

pytest.importorskip("safetensors.torch")


@pytest.mark.filterwarnings("ignore:EntropicMap has no plan yet")
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_a_card_runs(kind, tmp_path, monkeypatch):
    model, _ = model_of(kind)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "lightning_gap"
    assert "optimal-transport" in yaml.safe_load(front)["tags"]
    assert f"`{type(model.map).__name__}`" in text
    assert f"`{model.cost}`" in text
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["images"].shape == names["x"].shape
    assert ("training samples of the target" in text) == isinstance(model.map, EntropicMap)


def test_names_do_not_break_a_card(tmp_path):
    names = ["<script>", "a|b", "``` \n# title", *(f"gene {i}" for i in range(20))]
    MongeMap(map=ResidualMLP(23, (4,)), feature_names=names).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script" not in card
    assert "\n# title" not in card
    assert "(23 in all)" in card


def test_scores_may_be_given_and_a_card_is_not_written_over(tmp_path, caplog):
    small().save_pretrained(tmp_path, scores={"lightning_gap/monge/test_l2_uvp_bound": 4.712, "other": float("nan")})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "at 95 %: L2-UVP ≤ 4.71 %" in card
    assert json.loads((tmp_path / "config.json").read_text())["scores"] == {"test_l2_uvp_bound": 4.712}
    (tmp_path / "README.md").write_text("mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text())["scores"] == {}


def test_labels_by_name_are_in_the_card(tmp_path, monkeypatch):
    x, y = gaussians(40)
    labels = ["CD4 T", "CD8 'T"] * 20
    data = SamplesDataModule(x, y, conditions=(labels, labels), batch_size=8, standardize=True)
    model = MongeMap(map=ConditionalMap(2, (8,), num_conditions=2))
    trainer(max_steps=2).fit(model, data)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "centred and scaled as the training samples were" in card
    assert "model.transport(x, 'CD4 T')" in card
    loaded = MongeMap.from_pretrained(tmp_path)
    assert torch.equal(loaded.transport(x, "CD8 'T"), model.transport(x, "CD8 'T"))
