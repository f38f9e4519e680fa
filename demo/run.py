"""`make demo`: a small GPT, 4 pipeline stages, real DeepSpeed in 4 processes, on simulated A100s, under Perseus."""

from __future__ import annotations

import json

from demo import job
from perseus_core.files import write_text


def main() -> int:
    """Runs the job and reports."""
    parser = job.arguments_parser("demo.run", __doc__, config="ds_config.json", output="demo-output")
    arguments = job.parse(parser)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    # The one thing added to the file: where the frontier goes that the pictures are drawn from.
    config["perseus"]["frontier_file"] = str(output / "frontier.json")
    write_text(output / "ds_config.json", json.dumps(config, indent=2) + "\n")

    print(f"DeepSpeed config {arguments.config}: perseus = {json.dumps(config['perseus'])}")
    training = ["--config", str(output / "ds_config.json"), "--stages", "4"]
    if not job.run_and_report(arguments, training, config["perseus"], output, module="demo.train_gpt"):
        return 1
    job.say_where_to_change_what(
        arguments, "demo.run", block=', block "perseus"', model="demo/gpt.py, demo/train_gpt.py"
    )
    return 0


if __name__ == "__main__":
    job.exit_with(main)
