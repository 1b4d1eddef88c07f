"""Installs prism_mcore and its kernels; exact tested versions are in constraints.txt."""

from setuptools import find_packages, setup

EXTRAS = {
    # Verifiable rewards.
    "rl": ["math-verify", "reasoning-gym", "pyseccomp"],
    # What the demo corpus is made of.
    "demo": ["reasoning-gym", "periodictable"],
    # Its tasks on our engine: launch/evaluate.py --lm-eval.
    "lm-eval": ["lm-eval==0.4.13"],
    "dev": ["triton", "pytest", "pytest-xdist", "scipy", "ruff", "mypy", "types-PyYAML", "types-psutil"],
}

setup(
    name="prism_mcore",
    version="0.1.0",
    description="Mid-training, RL, evaluation and analysis of open 3-24B language models on megatron-core",
    python_requires=">=3.11",
    # kernels/ itself is not a package: one called "kernels" at the root shadows the one transformers imports.
    package_dir={"prism_mcore": "prism_mcore", "prism_kernels": "kernels/prism_kernels"},
    packages=[
        "prism_mcore",
        "prism_mcore.data",
        "prism_mcore.model",
        "prism_mcore.model.families",
        "prism_mcore.checkpoint",
        "prism_mcore.convert",
        "prism_mcore.train",
        "prism_mcore.generate",
        "prism_mcore.evaluate",
        "prism_mcore.rewards",
        "prism_mcore.rewards.sandbox",
        "prism_mcore.plan",
        "prism_mcore.rl",
        "prism_mcore.analyze",
        "prism_mcore.study",
        "prism_kernels",
        *(f"prism_kernels.{folder}" for folder in find_packages("kernels/prism_kernels")),  # one per group of ops
    ],
    # The shapes that recipes name, and questions for a first look.
    package_data={"prism_mcore.model": ["configs/*.json"], "prism_mcore.evaluate": ["problems/*.jsonl"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core==0.16.1",
        "numpy",
        "psutil",  # megatron-core's checkpoint writer needs it and does not declare it
        "einops",  # and so does its distributed optimizer with several instances
        "safetensors",
        "tokenizers",
        "transformers",
        "pydantic>=2",
        "PyYAML",
        "rich",
        "tensorboard",
        "matplotlib",
        "pyarrow",  # parquet corpora
        "zstandard",  # .jsonl.zst corpora
        "doit",  # the order of a study's nodes
    ],
    extras_require=EXTRAS,
)
