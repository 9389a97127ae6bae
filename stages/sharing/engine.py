"""``llamafactory-cli`` with its answers about images put right.

    python -m stages.sharing.engine api config.yaml    # as `llamafactory-cli api config.yaml`

Two faults of LLaMA-Factory 0.9.5, both silent:

- Its engine does not tell ``generate`` which tokens are an image's. transformers 5.6 then gives
  them positions of text, and the model answers as if it saw the image badly.
- Its API hands OpenAI's ``presence_penalty`` (0: none) on as transformers' ``repetition_penalty``
  (1: none), of which 0 is an error and 0.5 nonsense.

``tests/test_serve.py`` holds what is answered here against the evaluation's answers.
"""

from typing import Any

from stages.families import registry


def correct(engine: Any) -> None:
    """Wrap ``_process_args`` of LLaMA-Factory's ``HuggingfaceEngine``."""
    prepare = engine._process_args

    def prepared(model: Any, *given: Any) -> tuple[dict[str, Any], int]:
        *first, options = given
        options = {name: value for name, value in options.items() if name != "repetition_penalty"}
        inputs, length = prepare(model, *first, options)
        if "image_grid_thw" in inputs:
            family = registry.of_type(model.config.model_type, name="the model")
            inputs |= family.position_inputs(inputs["inputs"], model.config.image_token_id)
        return inputs, length

    engine._process_args = staticmethod(prepared)


def main() -> None:
    from llamafactory.chat.hf_engine import HuggingfaceEngine
    from llamafactory.cli import main as llamafactory_cli

    correct(HuggingfaceEngine)
    llamafactory_cli()


if __name__ == "__main__":
    main()
