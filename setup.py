"""Package metadata. Tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

setup(
    name="perseus-train",
    version="0.1.0",
    description="Removes energy bloat from pipeline-parallel training with DeepSpeed and Megatron",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["perseus_core*", "perseus_ds*", "perseus_megatron*"]),
    py_modules=["perseus_autoload"],
    package_data={"perseus_core": ["py.typed", "planning/*.pyi", "planning/native/*", "report/page/*"]},
    ext_modules=[
        Extension(
            "perseus_core.planning._native",
            sources=sorted(map(str, Path("perseus_core/planning/native").glob("*.c"))),
            depends=sorted(map(str, Path("perseus_core/planning/native").glob("*.h"))),
            extra_compile_args=["-O3", "-std=c99"],
        )
    ],
    install_requires=["numpy>=1.24", "networkx>=3.0", "rich>=13.0"],
    extras_require={
        "deepspeed": ["torch>=2.5", "deepspeed>=0.14.5", "pydantic>=2", "nvidia-ml-py>=12.535"],
        "megatron": ["torch>=2.5", "megatron-core>=0.12", "nvidia-ml-py>=12.535"],
        "gpu": ["nvidia-ml-py>=12.535"],
        "report": ["matplotlib>=3.7"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "scipy>=1.11",
            "ruff>=0.6",
            "mypy>=1.11",
            "matplotlib>=3.7",
            "nvidia-ml-py>=12.535",
        ],
    },
    entry_points={
        "console_scripts": ["perseus = perseus_core.cli:main"],
        # torch calls this at the end of `import torch`; it only starts waiting for a framework to be imported.
        "torch.backends": ["perseus = perseus_autoload:autoload"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
