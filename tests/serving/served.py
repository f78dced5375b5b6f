"""What the clients' tests ask for."""

from pathlib import Path
from typing import Any

from particle_server import ParticleServer

from scalabl.serving.vllm import VLLMClassifier

NUMBER, SEED = 4, 5
LABELS = ["yes", "no", "red"]


def client(exported: Path, server: ParticleServer, **options: Any) -> VLLMClassifier:
    return VLLMClassifier.from_export(exported, url=server.url, timeout=30, **options)
