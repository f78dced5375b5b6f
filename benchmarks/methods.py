"""The methods whose training cost is compared, by name; the first is what the others are divided by."""

RANK = 8
TARGETS = ("q_proj", "v_proj")
METHODS = {
    "lora": "plain LoRA (PEFT)",
    "scalabl": "ScalaBL, diagonal",
    "scalabl-full": "ScalaBL, full covariance",
    "monteclora": "MonteCLoRA (PEFT), its defaults",
    "monteclora-unbuffered": "MonteCLoRA (PEFT), buffer_size = 1",
}
