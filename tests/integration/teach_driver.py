"""The worker with small chunks, so that a few records make many shards; `test_teach_kill.py` starts and kills it.

python -m launch.agent --standalone --nproc-per-node N tests/integration/teach_driver.py CHUNK RUN_FOLDER STAGE
"""

from __future__ import annotations

import sys

from data import store
from launch import worker
from train.teacher import claims

if __name__ == "__main__":
    store.CHUNK = claims.CHUNK = int(sys.argv[1])
    sys.exit(worker.main(sys.argv[2:]))
