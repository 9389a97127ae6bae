"""easy-VQA's own test questions for lm-eval: its documents, their images and their grading."""

from pathlib import Path
from typing import Any

from stages.answers.grading import is_correct
from stages.core.errors import UserError
from stages.model import formatted


def documents(formatted_data: str, images: str, **_: Any) -> dict[str, Any]:
    """The questions in hash order, so that the first ones are a fair sample over all images.

    Args:
        formatted_data: the format stage's folder, which holds ``questions.json``.
        images: the folder that its image names are relative to.

    Raises:
        UserError: there are no questions, since the data set has none of its own.
    """
    from datasets import Dataset

    rows = formatted.read(Path(formatted_data), "questions")
    if not rows:
        raise UserError(
            f"evaluate.lm_eval.easy_vqa: {formatted_data}/questions.json is empty, because the "
            "data set has no questions with known answers; remove easy_vqa from evaluate.lm_eval"
        )
    return {
        "test": Dataset.from_list(
            [
                {
                    "id": row["id"],
                    "kind": row["kind"],
                    "question": formatted.question(row),
                    "answer": row["answer"],
                    "image": str(Path(images) / row["images"][0]),
                }
                for row in formatted.sample(rows, len(rows))
            ]
        )
    }


def image(doc: dict[str, Any]) -> list[Any]:
    """The image of a question, decoded: thousands of open files would be too many."""
    from PIL import Image

    with Image.open(doc["image"]) as opened:
        return [opened.convert("RGB")]


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """``accuracy``: 1 for a right answer, 0 for a wrong one."""
    return {"accuracy": float(is_correct(doc["question"], doc["answer"], answers[0]))}
