"""A run's particles outside of this program: as plain LoRAs on disk, and behind an OpenAI-compatible server.

scalabl export      OUT/particles/0 ... N-1, each a plain LoRA, and manifest.json: what they are and how to ask them
vllm serve          one adapter a particle (`command.py` gives the line)
scalabl.serving.vllm        asks for every particle's probabilities and averages them
"""
