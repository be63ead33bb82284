"""whence bank."""

from __future__ import annotations

import json
from dataclasses import dataclass

from whence.cli.common import BankData, BankName, Device, Output, Ray, Shard, Workers, engine_on, shard_of
from whence.cli.options import Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Bank:
    """Build a bank: train all its models, measure its queries. The bank is in OUTPUT_DIR/bank."""

    name: BankName
    output_dir: Output
    data_dir: BankData = None
    shard: Shard = "0/1"
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def bank(options: Bank) -> None:
    from whence.evaluation import banks

    recipe = banks.by_name(options.name, options.data_dir)
    shard, engine = shard_of(options.shard), engine_on(options.device, workers=options.workers, ray=options.ray)
    say(json.dumps(banks.build(recipe, options.name, options.output_dir, shard, engine).status()))


VERB = Verb(bank, Bank)
