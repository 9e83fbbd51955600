"""Scores a file of predictions as the benchmark's owners do, and prints one JSON object.

    python -m launch.score captions --references=R.json --predictions=P.json [--meteor]
    python -m launch.score vqa --annotations=A.json --predictions=P.json [--questions=Q.json]
    python -m launch.score wups --annotations=test.csv --predictions=P.json --wordnet=FOLDER
    python -m launch.score mwap --annotations=rareact.csv --predictions=P.npy
    python -m launch.score ndcg --annotations=A.json --predictions=P.json
    python -m launch.score auc --annotations=A.jsonl --predictions=P.json
    python -m launch.score rescore --predictions=OUTPUT/predictions/RUN.jsonl

References and predictions are in the forms of COCO, VQAv2 (also TextVQA's and VizWiz's), NExT-OE,
RareAct, VisDial and HatefulMemes; `rescore` reads what `launch.evaluate --suite` stored, which has
the references in it. Every score comes with its standard error and 95 % interval.
Scores are from 0 to 1, CIDEr from 0 to 10. Neither a GPU nor a model is needed.
flamingo_jax/evaluation/README.md says whose scorer each metric agrees with.
"""

import json

from absl import flags

from flamingo_jax import paths
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.vqa_accuracy import VARIANTS
from flamingo_jax.evaluation.scoring.report import ScoreReport
from launch import command

TASKS = ("captions", "vqa", "wups", "mwap", "ndcg", "auc", "rescore")
REFERENCES = flags.DEFINE_string("references", "", "Captions in COCO's annotation form.")
ANNOTATIONS = flags.DEFINE_string("annotations", "", "Ground truths in their official form.")
QUESTIONS = flags.DEFINE_string(
    "questions", "", "Questions in VQAv2's form, to check that the annotations are of them."
)
PREDICTIONS = flags.DEFINE_string("predictions", "", "The predictions that are scored.")
PER_ITEM = flags.DEFINE_string("per_item", "", "JSON file that each item's scores are written to.")
SKIP_INCOMPLETE = flags.DEFINE_bool(
    "skip_incomplete",
    False,
    "Score the items that have both a prediction and a reference, and list the others; by default"
    " they are an error.",
)
METEOR = flags.DEFINE_bool(
    "meteor", False, "Compute METEOR as well; it needs Java and pip install 'flamingo_jax[meteor]'."
)
VARIANT = flags.DEFINE_enum(
    "variant", "official", list(VARIANTS), "Whose rules VQA accuracy is computed by."
)
STEMS = flags.DEFINE_bool(
    "stems", False, "Reduce predictions to stems, as OK-VQA's answers are; it reads --wordnet."
)
WORDNET = flags.DEFINE_string(
    "wordnet", "", "Folder of WordNet 3.0's files; by default Debian's or nltk's."
)
MORE_REFERENCES = flags.DEFINE_string(
    "more_references", "", "NExT-OE's second answers, add_reference_answer_test.json."
)
_READS = {
    "captions": ("references", "meteor", "skip_incomplete"),
    "vqa": ("annotations", "questions", "variant", "stems", "wordnet", "skip_incomplete"),
    "wups": ("annotations", "wordnet", "more_references", "skip_incomplete"),
    "mwap": ("annotations",),
    "ndcg": ("annotations", "skip_incomplete"),
    "auc": ("annotations", "skip_incomplete"),
    "rescore": ("wordnet",),
}


def main(task: str) -> int:
    """Scores by the flags."""
    command.reject_unused_flags(_READS, task, command.given_flags())
    truths = ("references", REFERENCES) if task == "captions" else ("annotations", ANNOTATIONS)
    needed = (*(() if task == "rescore" else (truths,)), ("predictions", PREDICTIONS))
    for name, flag in needed:
        if not flag.value:
            raise UserError(f"--{name} is not set: name the file")
    report = score(task)
    if PER_ITEM.value:
        path = paths.as_path(PER_ITEM.value)
        try:
            path.write_text(json.dumps(report.items, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--per_item={path} cannot be written: {error.strerror}") from None
    print(json.dumps({"task": task, **report.to_json()}, indent=2, ensure_ascii=False))
    return 0


def score(task: str) -> ScoreReport:
    """Scores the files of the flags."""
    # Each task imports its own part, so that one is there at once.
    skip = SKIP_INCOMPLETE.value
    if task == "captions":
        from flamingo_jax.evaluation.scoring.captions import score_caption_files

        return score_caption_files(
            REFERENCES.value, PREDICTIONS.value, with_meteor=METEOR.value, skip_incomplete=skip
        )
    if task == "vqa":
        from flamingo_jax.evaluation.scoring.questions import score_answer_files

        return score_answer_files(
            ANNOTATIONS.value,
            PREDICTIONS.value,
            QUESTIONS.value,
            variant=VARIANT.value,
            wordnet=WORDNET.value,
            stems=STEMS.value,
            skip_incomplete=skip,
        )
    if task == "wups":
        from flamingo_jax.evaluation.scoring.wups import score_wups_files

        return score_wups_files(
            ANNOTATIONS.value,
            PREDICTIONS.value,
            MORE_REFERENCES.value,
            wordnet=WORDNET.value,
            skip_incomplete=skip,
        )
    if task == "rescore":
        from flamingo_jax.evaluation.results.stored_predictions import rescore_file

        return rescore_file(paths.as_path(PREDICTIONS.value), WORDNET.value)
    from flamingo_jax.evaluation.scoring import ranked

    if task == "mwap":
        return ranked.score_mwap_files(ANNOTATIONS.value, PREDICTIONS.value)
    of_task = {"ndcg": ranked.score_ndcg_files, "auc": ranked.score_auc_files}[task]
    return of_task(ANNOTATIONS.value, PREDICTIONS.value, skip_incomplete=skip)


if __name__ == "__main__":
    command.run(main, verbs=TASKS)
