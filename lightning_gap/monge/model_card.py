"""The card of a map: what a reader of its folder is told, in the format of the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]

_FRONT = """\
---
library_name: lightning_gap
tags:
- optimal-transport
- monge-map
- pytorch
- lightning
---
"""
_USE = """\
## Use

`pip install 'lightning_gap[hub]'`, and nothing of the training:

```python
import torch
from lightning_gap import MongeMap

# This folder; of the hub, what huggingface_hub.snapshot_download("owner/name") returns.
model = MongeMap.from_pretrained({arguments})
x = {samples}
images = model.transport(x{condition}){remark}
```

`config.json` names the map's class and its arguments, `model.safetensors` holds its numbers: neither can run anything.
"""
_STAGES = {"test": "a test", "val": "a validation"}
_MOST_NAMES = 8


def model_card(config: Mapping[str, Any]) -> str:
    """Return the text of ``README.md`` for a map that ``config.json`` describes.

    Args:
        config: What :meth:`MongeMap.save_pretrained` writes there.
    """
    arguments = config["arguments"]
    name = str(config["map"].get("class_path") or config["map"].get("name")).rpartition(".")[2]
    title = f"# {_plain(name)}: an optimal transport map for the cost {_plain(arguments['cost'])}"
    parts = [_FRONT + title, "\n".join(f"- {line}" for line in _facts(config, name))]
    if config.get("scores"):
        parts.append(_scores(config["scores"]))
    parts.append(_use(config, name))
    return "\n\n".join(parts)


def _facts(config: Mapping[str, Any], name: str) -> list[str]:
    arguments, loss = config["arguments"], config["arguments"]["fitting_loss"]
    loss = loss if isinstance(loss, str) else (loss or {}).get("name", "a function")
    weight = arguments["gap_weight"]
    weight = f"{weight:g}" if isinstance(weight, int | float) else "by a schedule"
    fitted_by = f" for {_code(arguments['fitting_cost'])}" + _epsilon(config, "fitting_epsilon")
    fitted_by = fitted_by if loss == "sinkhorn" else ""
    kind = "" if "class_path" in config["map"] else ", a network of its authors' own"
    facts = [f"**Map**: {_code(name)}{kind}, {config['dtype']}; {_coordinates(config)}"]
    facts.append(
        f"**Cost**: {_code(arguments['cost'])}. The map carries samples of a source to those of a target, which were "
        f"not paired, and is to pay no more than it must. Fitting loss {_code(loss)}{fitted_by}; "
        f"weight of the Monge gap {weight}{_epsilon(config, 'gap_epsilon')}."
    )
    if name == "EntropicMap":
        facts.append("**Samples**: the map is made of training samples of the target, which its weights hold.")
    if (sizes := config.get("samples")) is not None:
        updates = f", {config['updates']} updates in the last fit" if config.get("updates") else ""
        facts.append(f"**Data**: {sizes[0]} training samples of the source, {sizes[1]} of the target{updates}.")
    for what, names in (("Features", arguments["feature_names"]), ("Conditions", arguments["condition_names"])):
        if names:
            facts.append(f"**{what}**: {_listed(names)}")
    if (encoding := arguments["condition_encoding"]) is not None:
        columns = [str(column["name"]) for column in encoding["columns"]]
        facts.append(f"**Columns of conditions**: {_listed(columns)}")
    facts.append(f"**Written by** lightning_gap {config['library_version']}, format {config['format']}.")
    return facts


def _coordinates(config: Mapping[str, Any]) -> str:
    dim, encoding = config["dim"], config["arguments"]["representation"]
    features = "any number of features" if dim is None else f"{dim} features"
    if encoding is None:
        return f"{features}, as they are."
    if encoding["components"] is None:
        return f"{features}, centred and scaled as the training samples were."
    return f"{features}, centred and scaled, in {encoding['components']} principal components of the training samples."


def _epsilon(config: Mapping[str, Any], name: str) -> str:
    value = config["epsilons"][name]
    return "" if value is None else f", epsilon {value:.4g}"


def _scores(scores: Mapping[str, float]) -> str:
    stages = {name.partition("_")[0] for name in scores} & set(_STAGES)
    of = f" of {_STAGES[stages.pop()]}" if len(stages) == 1 else ""
    lines = [f"## Held-out scores{of}", "", "| score | value |", "| --- | --- |"]
    lines += [f"| {_code(name)} | {value:.4g} |" for name, value in sorted(scores.items())]
    for name, said in (("l2_uvp_bound", "L2-UVP"), ("suboptimality_upper", "Paid in vain")):
        found = next((value for key, value in scores.items() if key in (name, f"test_{name}")), None)
        if found is not None:
            lines += ["", f"Certificate, from held-out samples, at 95 %: {said} ≤ {found:.3g} %."]
            break
    return "\n".join(lines)


def _use(config: Mapping[str, Any], name: str) -> str:
    arguments = config["arguments"]
    own = "class_path" not in config["map"]
    given = ['"."', *(["map=your_network"] if own else [])]
    given += [f"{term}=your_{term}" for term in config.get("own_costs", ())]
    dim = config["dim"]
    samples = f"torch.randn(5, {'d' if dim is None else dim})"
    if config["on_sphere"]:
        samples = f"torch.nn.functional.normalize({samples}, dim=1)"
    condition = ""
    if config["conditional"]:
        names, vector = arguments["condition_names"], arguments["condition_range"]
        condition = f", {str(names[0])!r}" if names else ", 0"
        if not names and vector is not None:
            condition = f", torch.tensor({[float(number) for number in vector[0]]})"
        elif not names and config["condition_dim"] is not None:
            condition = f", torch.zeros({config['condition_dim']})"
    names = arguments["feature_names"]
    remark = "  # or a data frame, or AnnData: features are found by name" if names else ""
    use = _USE.format(arguments=", ".join(given), samples=samples, condition=condition, remark=remark)
    if own:
        network = _code(config["map"]["name"])
        use += f"\nThe network is {network}, whose code is not here: make it, and give it as `map=`.\n"
    return use


def _plain(text: Any) -> str:
    """Return a text in one line, without what a page would read as more than text."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/").replace("<", "‹").replace(">", "›")


def _code(text: Any) -> str:
    return f"`{_plain(text)}`"


def _listed(names: list[Any]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(_code(name) for name in names[:_MOST_NAMES]) + more
