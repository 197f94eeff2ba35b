#!/usr/bin/env bash
# Two machines on one: network and mount namespaces of their own, joined by a cable, with nothing shared.
#
#   sudo benchmarks/namespaces.sh STUDY    a study whose model and texts are fetched, with runtime.ray: null
#
# The first has the study, and Ray's head without CPUs. The second has the libraries and an empty folder in the study's
# place. A calibration by tasks on the second has to give the bytes of one in this process.
set -euo pipefail
study=$(realpath "$1")
copy=$(mktemp -d)
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_AUTH_MODE=disabled
wanda() { python -c 'from wanda_dvc.cli import run; run()' "$@"; }
inside() { ip netns exec "$@"; }
end() {
    for name in first second; do
        ip netns pids "wanda-$name" | xargs --no-run-if-empty kill -9
        ip netns delete "wanda-$name"
    done
    rm -rf "$copy"
}
trap end EXIT

ip netns add wanda-first
ip netns add wanda-second
ip link add wanda0 netns wanda-first type veth peer name wanda0 netns wanda-second
inside wanda-first ip address add 10.77.0.1/24 dev wanda0
inside wanda-second ip address add 10.77.0.2/24 dev wanda0
for name in first second; do
    inside "wanda-$name" ip link set lo up
    inside "wanda-$name" ip link set wanda0 up
done

cd "$study"
wanda calibrate
cp -r stats "$copy/alone"
sed -i 's/^  ray:.*/  ray: 10.77.0.1:6379/' params.yaml
inside wanda-first ray start --head --node-ip-address 10.77.0.1 --port 6379 --num-cpus 0 --include-dashboard false
# A mount namespace too: what hides the study there is seen nowhere else.
inside wanda-second unshare --mount bash -c "
    mount -t tmpfs none '$study' && mkdir -p /tmp/elsewhere && cd /tmp/elsewhere
    ray start --address 10.77.0.1:6379 --node-ip-address 10.77.0.2 --num-cpus 2"
inside wanda-first python -c 'from wanda_dvc.cli import run; run()' doctor | grep runtime.ray || true # other rows may fail
inside wanda-first python -c 'from wanda_dvc.cli import run; run()' calibrate
sed -i 's/^  ray:.*/  ray: null/' params.yaml
diff -r "$copy/alone" stats
cat .dvc/tmp/wanda-dvc-times/calibrate-*
echo "the same bytes, computed where the checkpoint is not"
