"""Flower's simulation: its Ray backend, one CPU a client actor, the model kept between calls."""

from __future__ import annotations

import argparse
import os

parser = argparse.ArgumentParser()
parser.add_argument("--work", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--processes", type=int, default=2)
args = parser.parse_args()
os.environ |= {
    "BENCH_WORK": os.path.abspath(args.work),
    "BENCH_OUT": os.path.abspath(args.out),
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_HOME": os.path.abspath(args.out + ".home"),
}

import flower_app
import numpy as np
from flwr.simulation import run_simulation

run_simulation(
    server_app=flower_app.server_app,
    client_app=flower_app.client_app,
    num_supernodes=len(np.load(args.work)["counts"]),
    backend_config={
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": args.processes},
    },
)
