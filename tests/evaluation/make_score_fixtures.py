"""Writes what the owners' scorers say of the made cases, for tests that run without them.

    python -m tests.evaluation.make_score_fixtures [--owners=FOLDER]

pip install -e '.[score-test]' brings pycocoevalcap, which needs Java. The scorers of VQA, TextVQA
and VizWiz are no packages: FOLDER holds a module vqa_eval.py with their evaluation as functions
`official`, `lmms_vqav2` and `vizwiz` (prediction, [{"answer", "answer_id"}]) and `textvqa`
(prediction, [answer]).
"""

import contextlib
import io
import json
import pathlib
import sys
from typing import Any

from tests.evaluation.score_cases import HARD, answers, captions

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SIZE = {"images": 40, "references": 5, "seed": 1}


def caption_scores(predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
    """pycocoevalcap's tokens and scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truths = tokenizer.tokenize(
        {i: [{"caption": text} for text in group] for i, group in enumerate(references)}
    )
    found = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleus = Bleu(4).compute_score(truths, found)
        others = {"CIDEr-D": Cider(), "ROUGE-L": Rouge()}
        scored = {name: made.compute_score(truths, found) for name, made in others.items()}
    scored |= {f"BLEU-{n + 1}": (bleu[n], bleus[n]) for n in range(4)}
    return {
        "tokens": [found[i][0] for i in range(len(predictions))],
        "scores": {
            name: {"set": float(whole), "items": [float(score) for score in items]}
            for name, (whole, items) in scored.items()
        },
    }


def hard_tokens() -> list[str]:
    """pycocoevalcap's tokens of the hard lines."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(HARD)})
    return [found[i][0] for i in range(len(HARD))]


def answer_scores() -> dict[str, list[float]]:
    """The scores of the owners' evaluations of answers."""
    import vqa_eval

    found: dict[str, list[float]] = {"official": [], "textvqa": [], "lmms_eval": [], "vizwiz": []}
    for prediction, truths in answers(300, seed=2):
        records = [{"answer": text, "answer_id": i} for i, text in enumerate(truths)]
        found["official"].append(vqa_eval.official(prediction, records))
        found["textvqa"].append(vqa_eval.textvqa(prediction, truths))
        found["lmms_eval"].append(vqa_eval.lmms_vqav2(prediction, records))
        found["vizwiz"].append(vqa_eval.vizwiz(prediction, records))
    return found


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    made: dict[str, Any] = {
        "captions": caption_scores(*captions(**SIZE)),
        "hard_captions": hard_tokens(),
    }
    for argument in sys.argv[1:]:
        sys.path.insert(0, argument.removeprefix("--owners="))
        made["answers"] = answer_scores()
    for name, content in made.items():
        text = json.dumps(content, ensure_ascii=False, indent=0)
        (FIXTURES / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
