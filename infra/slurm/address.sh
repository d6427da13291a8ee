#!/usr/bin/env bash
# Print the scheduler's address: negfacediff build demo --executor "$(infra/slurm/address.sh)"
set -euo pipefail
# shellcheck source=infra/slurm/site.sh
source "$(dirname "${BASH_SOURCE[0]}")/site.sh"

[ -e "$SCHEDULER_FILE" ] || {
    echo "There is no $SCHEDULER_FILE: submit scheduler.sbatch and wait until it runs." >&2
    exit 1
}
python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$SCHEDULER_FILE"
