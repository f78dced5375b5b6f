from .manifest import ParticleManifest as ParticleManifest
from .manifest import read_manifest as read_manifest
from .vllm import VLLMClassifier as VLLMClassifier
