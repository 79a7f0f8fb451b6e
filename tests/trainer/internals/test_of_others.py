"""What the private names of other libraries do in the installed versions, one test a name.

A test that fails here says which name of which package has changed; its function in ``trainer/internals`` is to mend.
"""

import argparse

import pytest

from lightning_gap.trainer.internals import of_others as others


def test_a_parser_tells_its_options_and_commands():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size")
    assert others.commands_of(parser) == {}
    fit = parser.add_subparsers().add_parser("fit")
    assert [action.dest for action in others.options_of(parser)] == ["help", "size"]
    assert others.commands_of(parser) == {"fit": fit}
    other = argparse.ArgumentParser()
    others.commands_of(parser)["fit"] = other
    assert others.commands_of(parser) == {"fit": other}


def test_a_workspace_tells_what_it_sends():
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    model = others.workspace_model(workspaces.Workspace(entity="a", project="b", name="c", sections=[]))
    assert '"c"' in model.model_dump_json(by_alias=True)
