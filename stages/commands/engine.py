"""``llamafactory-cli`` with its answers about images, and the names on its page, put right.

    python -m stages engine api config.yaml    # as `llamafactory-cli api config.yaml`

Three faults of LLaMA-Factory 0.9.5, all silent:

- Its engine does not tell ``generate`` which tokens are an image's. transformers 5.6 then gives
  them positions of text, and the model answers as if it saw the image badly.
- Its API hands OpenAI's ``presence_penalty`` (0: none) on as transformers' ``repetition_penalty``
  (1: none), of which 0 is an error and 0.5 nonsense.
- Its page names its boxes when the language changes, which with Gradio 5 happens only by hand, so
  that they are called Dropdown, Slider and Checkbox. (Its temperature starts at 0.95; here it is
  0.01, with the evaluation's answers.)

``tests/test_serve.py`` holds what is answered here against the evaluation's answers.
"""

import sys
from collections.abc import Iterator
from typing import Any

from stages.families import known


def correct(engine: Any) -> None:
    """Wrap ``_process_args`` of LLaMA-Factory's ``HuggingfaceEngine``."""
    prepare = engine._process_args

    def prepared(model: Any, *given: Any) -> tuple[dict[str, Any], int]:
        *first, options = given
        options = {name: value for name, value in options.items() if name != "repetition_penalty"}
        inputs, length = prepare(model, *first, options)
        if "image_grid_thw" in inputs:
            family = known.of_type(model.config.model_type, name="the model")
            inputs |= family.position_inputs(inputs["inputs"], model.config.image_token_id)
        return inputs, length

    engine._process_args = staticmethod(prepared)


def name_the_boxes(page: Any) -> None:
    """Wrap ``resume`` of LLaMA-Factory's ``webui.engine.Engine``, which fills the page."""
    fill = page.resume

    def filled(self: Any) -> Iterator[dict[Any, Any]]:
        yield from fill(self)
        yield self.change_lang("en")
        yield self._update_component({"infer.temperature": {"value": 0.01}})

    page.resume = filled


def main() -> None:
    from llamafactory.chat.hf_engine import HuggingfaceEngine
    from llamafactory.cli import main as llamafactory_cli

    correct(HuggingfaceEngine)
    if sys.argv[1:2] == ["webchat"]:
        from llamafactory.webui.engine import Engine

        name_the_boxes(Engine)
    llamafactory_cli()


if __name__ == "__main__":
    main()
