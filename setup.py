"""Metadata of diffusers-diffdoctor; the settings of the development tools live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "src/diffusers_diffdoctor/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

INSTALL_REQUIRES = [
    "torch>=2.10",
    "diffusers>=0.39",
    "transformers>=5.18",
    "trl>=1.0",
    "peft>=0.19",
    "accelerate>=1.12",
    "datasets>=4.0",
    "pyarrow>=16",
    "huggingface-hub>=1.3",
    "filelock>=3.12",
    "evaluate>=0.4.6",
    "bitsandbytes>=0.50",
    "safetensors>=0.7",
    "sentencepiece>=0.2",
    "protobuf>=5.29",
    "numpy>=2.0",
    "pillow>=12.2",
    "matplotlib>=3.9",
    "jinja2>=3.1",
    "pyyaml>=6.0",
    "tqdm>=4.66",
]
EXTRAS = {
    "quantization": ["torchao>=0.16"],
    "cluster": ["datatrove>=0.10"],
    "ui": ["gradio>=6.20"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "tensorboard>=2.18",
        "ftfy>=6.3",
        "scipy>=1.13",
        "pycocotools>=2.0.8",
        "torchao>=0.16",
        "datatrove>=0.10",
    ],
    "quality": ["ruff>=0.14"],
    "docs": ["hf-doc-builder>=0.5"],
}
EXTRAS["dev"] = EXTRAS["test"] + EXTRAS["quality"]

setup(
    name="diffusers-diffdoctor",
    version=VERSION,
    description="Find the broken pixels in generated images and teach the diffusion model not to make them",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="diffusion, artifacts, image generation, reward fine-tuning, LoRA, diffusers, transformers, trl, peft",
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["diffdoctor"],
    package_data={
        "diffusers_diffdoctor": [
            "py.typed",
            "**/*.md",
            "**/*.html",
            "**/*.css",
            "**/*.js",
            "**/*.yaml",
            "treatment/recipes/*.txt",
            "miniature/weights/**/*",
        ]
    },
    include_package_data=True,
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["diffdoctor = diffdoctor:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
