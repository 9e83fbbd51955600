"""A WordNet of a few words, in the format of its files."""

import pathlib

NOUNS = {
    "entity": (),
    "animal": ("entity",),
    "dog": ("animal",),
    "cat": ("animal",),
    "poodle": ("dog",),
    "toy": ("entity",),
    "play": ("entity",),
}
VERBS = {"act": (), "play": ("act",), "run": ("act",), "leave": ()}
USES = {("play", 1): 3, ("play", 2): 20, ("dog", 1): 5}


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the files; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, words, kind in (
        ("noun", NOUNS, "n"),
        ("verb", VERBS, "v"),
        ("adj", {}, "a"),
        ("adv", {}, "r"),
    ):
        offsets: dict[str, int] = {}
        size = 0
        for word, above in words.items():
            offsets[word] = size
            size += len(_line(0, kind, word, [0 for _ in above]))
        lines = [
            _line(offsets[word], kind, word, [offsets[up] for up in above])
            for word, above in words.items()
        ]
        (folder / f"data.{name}").write_text("".join(lines))
        (folder / f"index.{name}").write_text(
            "  1 a line of the licence\n"
            + "".join(f"{word} {kind} 1 0 1 0 {offsets[word]:08}  \n" for word in sorted(words))
        )
        (folder / f"{name}.exc").write_text("left leave\n" if kind == "v" else "")
    (folder / "cntlist.rev").write_text(
        "".join(f"{word}%{kind}:00:00:: 1 {count}\n" for (word, kind), count in USES.items())
    )
    return folder


def _line(offset: int, kind: str, word: str, above: list[int]) -> str:
    pointers = "".join(f" @ {up:08} {kind} 0000" for up in above)
    return f"{offset:08} 03 {kind} 01 {word} 0 {len(above):03}{pointers} | a gloss  \n"
