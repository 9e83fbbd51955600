"""A model card has front matter that YAML reads, its tables, and the licences that the folders of
the parts state.
"""

import pathlib

import pytest

from flamingo_jax.checkpointing.model_card import ModelCard, describe_part, licence_of, render


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, ""),
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"}, "apache-2.0"),
        ({"README.md": '---\nlicense: "cc-by-4.0"\n---\n'}, "cc-by-4.0"),
        # Not front matter: it does not end, or does not begin the file.
        ({"README.md": "---\nlicense: mit\n"}, ""),
        ({"README.md": "# A model\n---\nlicense: mit\n---\n"}, ""),
        ({"README.md": "# A model\n", "LICENSE": "\n  MIT License\n\nCopyright"}, "MIT License"),
        ({"LICENCE.txt": "# The Llama Licence\n"}, "The Llama Licence"),
        ({"license_notes.txt": "nothing"}, ""),
    ],
)
def test_the_licence_is_what_the_folder_states(
    files: dict[str, str], licence: str, tmp_path: pathlib.Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = licence_of(tmp_path)
    assert found.partition(" (")[0] == licence


def test_a_missing_folder_states_nothing(tmp_path: pathlib.Path) -> None:
    assert licence_of(tmp_path / "none") == ""


def test_a_card_is_markdown_with_front_matter(tmp_path: pathlib.Path) -> None:
    yaml = pytest.importorskip("yaml")
    (tmp_path / "LICENSE").write_text("MIT License")
    text = render(
        ModelCard(
            "A | name",
            "It answers.",
            parameters={"resampler": 1200, "language model": 34},
            parts=(describe_part("language_model", tmp_path, "abc", included=False),),
            training={"exported step": "3 of 4"},
            data=({"dataset": "m3w", "kind": "pages"},),
            figures={"held_out/m3w/loss": 1.23456},
            loading="```python\n```\n",
            front_matter={"pipeline_tag": "image-text-to-text"},
        )
    )
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "library_name": "flamingo_jax",
        "tags": ["flamingo", "jax"],
        "pipeline_tag": "image-text-to-text",
    }
    for line in (
        "# A \\| name",
        "| total | 1,234 |",
        "| exported step | 3 of 4 |",
        "| m3w | pages |",
        "| held_out/m3w/loss | 1.235 |",
        f"| language model | `{tmp_path}` | `abc` | MIT License (LICENSE) |"
        " no: named by its digest |",
    ):
        assert line in body.splitlines(), line
