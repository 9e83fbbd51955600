"""Source `questions_folder`: converts a folder of images or videos and a JSONL of questions to
a VQA dataset.

`qa.jsonl` or `questions.jsonl` has one line per question, `{"image": "any/where/below.jpg",
"question": "What is it?", "answer": "a cat"}`. It may have `video` instead of `image`;
`answers` (one per annotator, as texts or as VQA's `{"answer": "a cat"}`) instead of `answer`;
and `type`, the type of question.

All questions about an image are in the same split, so that held-out questions are about unseen
images. Each record has its own copy of the image; `short_side` limits the size.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.build.captioned_folder import Unusable
from data_pipelines.build.captions import Texts, caption_file, file_name, is_missing, read_texts
from data_pipelines.build.files import FileRefused, NameResolver, existing_folder, find, walk
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.images import ANY_IMAGE, ImageRules
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    record_id,
)
from data_pipelines.build.text_files import (
    TOO_LONG,
    TOO_LONG_LINE,
    NotUtf8,
    as_utf8,
    json_lines,
)
from data_pipelines.build.video_folder import VideoFolder, stored_frames

FILES = ("qa.jsonl", "questions.jsonl")
BAD_LINE = "line that is not JSON with an image, a question and answers"
NO_QUESTION = "no question"
NO_ANSWER = "no answer"


@dataclasses.dataclass(frozen=True)
class QuestionLine:
    """A line of the JSONL. no_answers: the reason for each answer that is unusable."""

    text: str
    answers: tuple[str, ...]
    no_answers: tuple[str, ...] = ()
    type: str = ""


@dataclasses.dataclass(frozen=True)
class QuestionedVisual:
    """An image or video with all questions about it.

    bad: the reason why the entry gives no records, "" if it does.
    """

    folder: str
    name: str = ""
    is_video: bool = False
    questions: tuple[QuestionLine, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.name

    def all_dropped(self, reason: str) -> list[Converted]:
        """Drops every question for a reason, or the image itself if it has no questions."""
        if not self.questions:
            return [DroppedRecord(reason)]
        return [
            DroppedRecord(reason, texts_dropped=question.no_answers) for question in self.questions
        ]


@dataclasses.dataclass(frozen=True)
class QuestionsFolder:
    """Reads questions about images or videos, one record per question.

    file: the name of the JSONL, if it is another.
    rules: for images. fps, max_seconds, video_short_side: for videos, as in VideoFolder.
    """

    folders: tuple[str, ...]
    shares: SplitFractions = DEFAULT_SHARES
    file: str | None = None
    rules: ImageRules = ANY_IMAGE
    fps: float = VideoFolder.fps
    max_seconds: float = VideoFolder.max_seconds
    video_short_side: int = VideoFolder.short_side

    @property
    def kind(self) -> str:
        return "questions"

    @property
    def about(self) -> str:
        return "Questions about images or videos."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[QuestionedVisual]:
        """Lists visuals with questions, visuals without, and bad lines of the JSONL."""
        return [entry for folder in self.folders for entry in self._entries(folder)]

    def convert(self, entry: QuestionedVisual) -> list[Converted]:
        """Reads one visual and makes a record of each of its questions."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        folder = pathlib.Path(entry.folder)
        try:
            file = find((folder,), entry.name, self.folders)
        except FileRefused as error:
            return entry.all_dropped(str(error))
        if not entry.questions:
            return [DroppedRecord(NO_QUESTION)]
        try:
            frames, lost = self._frames(file, entry.is_video)
        except Unusable as error:
            return entry.all_dropped(str(error))
        name = record_id(self.folders, folder, entry.name)
        split = self.shares.split(name)
        outcomes: list[Converted] = []
        for number, question in enumerate(entry.questions):
            # Lost frames of a video are counted once, with its first question.
            parts = () if outcomes else lost
            if not question.text or not question.answers:
                reason = NO_ANSWER if question.text else NO_QUESTION
                outcomes.append(DroppedRecord(reason, parts, question.no_answers))
                continue
            fields = {"id": f"{name}#{number}", "frames": frames, "question": question.text}
            fields |= {"answers": list(question.answers), "type": question.type}
            outcomes.append(SplitRecord(split, fields, parts, question.no_answers))
        return outcomes

    def _frames(self, file: pathlib.Path, is_video: bool) -> tuple[list[bytes], tuple[str, ...]]:
        """Reads an image, or the frames of a video; raises Unusable."""
        if is_video:
            return stored_frames(
                file,
                fps=self.fps,
                max_seconds=self.max_seconds,
                short_side=self.video_short_side,
            )
        fields, lost = ImageFolder((), rules=self.rules).read(file)
        return [fields["image"]], lost

    def _entries(self, folder: str) -> list[QuestionedVisual]:
        """Groups the lines of one folder by their image or video."""
        root = existing_folder(folder)
        line = '{"image": "path/below/the/folder", "question": "What is it?", "answer": "a cat"}'
        found: dict[tuple[str, bool], list[QuestionLine]] = {}
        bad = []
        question_lines = caption_file(root, self.file, FILES, line)
        listing = walk(root, given=self.folders)
        resolve_name = NameResolver(root, listing.names)
        for record in json_lines(question_lines):
            try:
                is_video = is_missing(record.get("image"))
                name = resolve_name(file_name(record["video" if is_video else "image"]))
                found.setdefault((name, is_video), []).append(_question(record))
            except NotUtf8 as error:
                bad.append(str(error))
            except (ValueError, KeyError, TypeError, AttributeError):
                bad.append(TOO_LONG if record is TOO_LONG_LINE else BAD_LINE)
        question = {name for name, _ in found}
        listed = listing.ending(ImageFolder.suffixes | VideoFolder.suffixes)
        entries = [
            QuestionedVisual(folder, name, is_video, tuple(questions))
            for (name, is_video), questions in found.items()
        ]
        entries += [QuestionedVisual(folder, name) for name in listed.names if name not in question]
        entries += [
            QuestionedVisual(folder, refused.name, bad=refused.reason)
            for refused in listed.refused
            if refused.name not in question
        ]
        return entries + [QuestionedVisual(folder, bad=reason) for reason in bad]


def _question(record: dict[str, Any]) -> QuestionLine:
    """Parses a line; raises KeyError, TypeError, AttributeError or NotUtf8 for a bad one."""
    text = "" if is_missing(record["question"]) else as_utf8(record["question"])
    question_type = record.get("type")
    return QuestionLine(
        text, *_answers(record), "" if is_missing(question_type) else as_utf8(str(question_type))
    )


def _answers(record: dict[str, Any]) -> Texts:
    """Reads a line's answers; a number becomes a text."""
    answer = record.get("answer")
    if type(answer) in (int, float) and not is_missing(answer):
        record = record | {"answer": str(answer)}
    return read_texts(record, "answers", "answer")
