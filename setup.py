"""Installs goconv_tf; the pins that the Makefile uses are in requirements.txt."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "goconv_tf" / "__init__.py").read_text())[1]

setup(
    name="goconv_tf",
    version=VERSION,
    description="Learned image compression with generalized octave convolutions, hyperpriors and variable rate, in TensorFlow 2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["image compression", "learned image compression", "octave convolution", "hyperprior", "scalable coding", "TensorFlow"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Archiving :: Compression",
        "Typing :: Typed",
    ],
    project_urls={
        "Layers' paper": "https://arxiv.org/abs/2002.10032",
        "VariableRate's paper": "https://arxiv.org/abs/2009.13074",
        "CRPE's paper": "https://arxiv.org/abs/2209.03353",
    },
    # The zoo travels inside the package.
    packages=[*find_packages(include=["goconv_tf", "goconv_tf.*"]), "goconv_tf.pretrained"],
    package_dir={"goconv_tf.pretrained": "checkpoints"},
    package_data={
        "goconv_tf": ["published.json", "py.typed", "report_template.html"],
        "goconv_tf.pretrained": ["*/config.json", "*/model.safetensors", "*/README.md", "*/curve.png"],
    },
    python_requires=">=3.9,<3.12",
    install_requires=[
        "tensorflow~=2.14.1",
        "tensorflow-compression~=2.14.1",
        "numpy<2",
        "pillow>=10.1",
        "absl-py",
        "range-coder",
        "safetensors",
        "threadpoolctl",
        "tqdm",
        "matplotlib>=3.7",
        "bjontegaard",
        "scipy",
    ],
    entry_points={"console_scripts": ["goconv = goconv_tf.cli:main", "goconv-train = goconv_tf.cli:train"]},
    extras_require={
        "beam": ["apache-beam~=2.69"],
        "hub": ["huggingface_hub>=0.36"],
        "demo": ["scikit-image"],
        "docs": ["mkdocs>=1.6", "mkdocs-material", "mkdocstrings[python]"],
        "notebooks": ["ipykernel", "scikit-image"],
        "test": [
            *["pytest", "pytest-xdist", "websocket-client", "ruff", "mypy", "build", "nbclient", "ipykernel", "scikit-image"],
            *["apache-beam~=2.69", "huggingface_hub>=0.36"],
        ],
    },
)
