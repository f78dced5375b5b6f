"""What vLLM will not do with a run's particles as this program does. Imports no torch."""

from __future__ import annotations

from typing import Any

from scalabl.serving.command import MAX_LORA_RANKS

# LoRA on the output layer: its part is dropped from prompt logprobs; generated tokens' are right
OUTPUT_LAYER_ISSUE = "vLLM issue 51594"


def limits_of(
    config: dict[str, Any], record: dict[str, Any] | None, rank: int, adapts_output_layer: bool
) -> tuple[str, ...]:
    """Sentences, none where the particles are served as they are.

    Args:
        config: the adapter's configuration.
        record: the run's, None where there is none.
        rank: the largest of a layer.
        adapts_output_layer: whether lm_head is adapted.
    """
    found = []
    if adapts_output_layer:
        found.append(
            f"lm_head is adapted, and vLLM leaves that part out of prompt log-probabilities ({OUTPUT_LAYER_ISSUE}); "
            "scalabl.vllm does not ask for those, other clients must not either"
        )
    if rank > MAX_LORA_RANKS[-1]:
        found.append(f"the rank is {rank}, but vLLM serves at most {MAX_LORA_RANKS[-1]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found.append("ranks or scalings differ by layer, which older versions of vLLM ignore; 0.32 does not")
    if config.get("modules_to_save"):
        found.append("whole modules were trained (modules_to_save), which vLLM refuses to load")
    if config.get("bias", "none") != "none":
        found.append("biases were trained, which vLLM refuses to load")
    if record is None:
        found.append("the precision of the training is not recorded; vLLM takes half precision unless given a --dtype")
    else:
        bits = record["recipe"].get("bits")
        if bits is not None:
            found.append(f"the run's base was quantised to {bits} bits; a base in another precision answers otherwise")
        if record.get("predictive") == "linearized":
            found.append("the run itself predicts linearised; particles are its Monte Carlo predictive")
    return tuple(found)
