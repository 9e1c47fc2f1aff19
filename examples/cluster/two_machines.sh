#!/bin/bash
# Two machines by hand. The first argument is the address of the first machine with a free port,
# the second one says which machine this is:
#
#     examples/cluster/two_machines.sh 10.0.0.1:7777 0 --config FILE --mesh.fsdp 8     on 10.0.0.1
#     examples/cluster/two_machines.sh 10.0.0.1:7777 1 --config FILE --mesh.fsdp 8     on the other
#
# One process a machine uses all of its GPUs. Both machines need the same version of the package, the
# same data, and one folder for the run (output_dir) that both see, such as NFS.
set -euo pipefail
address=$1 process=$2
shift 2
exec irqlora train "$@" --distributed "$address" --process "$process" --processes 2
