#!/usr/bin/env bash
# A real SLURM on this machine alone: one slurmctld and N slurmd that listen on loopback, each a node n1, n2, ...
#   tests/slurm/start_cluster.sh start [FOLDER] [NODES]   prints the SLURM_CONF to export; NODES is 2 by default
#   tests/slurm/start_cluster.sh node FOLDER NAME         starts a node's slurmd again, as an administrator would
#   tests/slurm/start_cluster.sh stop FOLDER              ends the daemons and what is left of their jobs, by pid
# Needs no cgroups, no munge and no configuration in /etc. Whoever reaches the ports may run programs: for tests only.
set -euo pipefail

PACKAGES="slurmctld slurmd slurm-client"
PATIENCE_S=60

fail() {
    echo "error: $*" >&2
    exit 2
}

install_slurm() {
    command -v slurmctld slurmd sbatch srun scontrol scancel >/dev/null 2>&1 && return
    local how="SLURM is not installed; on Debian or Ubuntu: apt-get install $PACKAGES"
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || fail "$how"
    echo "installing $PACKAGES" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -q -y --no-install-recommends $PACKAGES; } >&2 || fail "$how"
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_ports() { # $1 ports in a row, below those that the kernel hands out
    local base port
    for _ in {1..200}; do
        base=$((15000 + RANDOM % 10000))
        for ((port = base; port < base + $1; port++)); do
            ! listens "$port" || continue 2
        done
        echo "$base"
        return
    done
    fail "there are no $1 free ports in a row between 15000 and 25000"
}

write_conf() { # FOLDER NODES PORT
    local memory node user
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    user=$(id -un)
    mkdir -p "$1/state" "$1/log" "$1/pids"
    cat >"$1/slurm.conf" <<END
ClusterName=test$3
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$3
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool-%n
SlurmctldPidFile=$1/pids/slurmctld
SlurmdPidFile=$1/pids/%n
SlurmctldLogFile=$1/log/slurmctld
SlurmdLogFile=$1/log/%n
# one user on one machine: nobody to prove anything to, and no cgroups
AuthType=auth/none
CryptoType=crypto/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# failures are noticed soon, and jobs come back
SlurmdTimeout=12
SlurmctldTimeout=30
MessageTimeout=10
JobRequeue=1
ReturnToService=2
AuthInfo=cred_expire=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
# a job that is cancelled or out of time has this long to save
KillWait=20
OverTimeLimit=0
MinJobAge=3600
# two clusters have no job number in common, so that ports made of them differ, too
FirstJobId=$((($3 - 15000) * 100 + 1))
END
    for ((node = 1; node <= $2; node++)); do
        echo "NodeName=n$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(($3 + node)) CPUs=$(nproc)" \
            "RealMemory=$memory" >>"$1/slurm.conf"
    done
    cat >>"$1/slurm.conf" <<END
# jobs of the second partition take the nodes of the first one's, which have GraceTime to save in and are queued again
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
END
}

start_node() { # FOLDER NAME
    mkdir -p "$1/spool-$2"
    slurmd -N "$2" >>"$1/log/$2.start" 2>&1 9>&- || fail "slurmd -N $2 did not start: $(tail -n 3 "$1/log/$2.start")"
}

all_idle() { [[ -z $(sinfo --noheader --Node --format %t 2>/dev/null | grep -v '^idle$') ]] && sinfo -h >/dev/null 2>&1; }

start() {
    install_slurm
    local folder nodes=${2:-2} node
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "NODES is $nodes: give a number from 1 to 99"
    folder=${1:-$(mktemp -d)}
    mkdir -p "$folder"
    folder=$(realpath "$folder")
    [[ ! -e $folder/slurm.conf ]] || fail "$folder has a slurm.conf: stop that cluster first, or give another folder"
    exec 9>"${TMPDIR:-/tmp}/test-slurm-ports.$(id -u)"
    flock 9 # until the daemons listen, so that another start sees which ports are taken
    write_conf "$folder" "$nodes" "$(free_ports $((nodes + 1)))"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld 9>&- >>"$folder/log/slurmctld.start" 2>&1 || fail "slurmctld did not start: see $folder/log"
    for ((node = 1; node <= nodes; node++)); do start_node "$folder" "n$node"; done
    local end=$((SECONDS + PATIENCE_S))
    until all_idle; do
        ((SECONDS < end)) || { stop "$folder"; fail "the nodes are not idle after $PATIENCE_S s: see $folder/log"; }
        sleep 0.2
    done
    echo "export SLURM_CONF=$SLURM_CONF"
}

ours() { # FOLDER: the pids of its daemons, and of all processes of its jobs
    local process
    for process in /proc/[0-9]*; do
        if grep -qzxF "SLURM_CONF=$1/slurm.conf" "$process/environ" 2>/dev/null; then
            case $(cat "$process/comm" 2>/dev/null) in
                slurmctld | slurmscriptd | slurmd | slurmstepd) echo "${process#/proc/}" ;;
                *) ! grep -qz "^SLURMD_NODENAME=" "$process/environ" 2>/dev/null || echo "${process#/proc/}" ;;
            esac
        fi
    done
}

stop() {
    [[ -f ${1:-}/slurm.conf ]] || fail "${1:-no folder} has no slurm.conf: give the folder of a cluster"
    local folder pids end
    folder=$(realpath "$1")
    SLURM_CONF=$folder/slurm.conf scancel --signal=KILL --user "$(id -un)" 2>/dev/null || true
    for signal in TERM KILL; do
        end=$((SECONDS + 10))
        while pids=$(ours "$folder"); [[ -n $pids ]] && ((SECONDS < end)); do
            kill -"$signal" $pids 2>/dev/null || true
            sleep 0.3
        done
    done
    [[ -z $pids ]] || fail "these processes do not end: $pids"
    rm -rf "$folder/slurm.conf" "$folder/state" "$folder/pids" "$folder"/spool-* # the logs stay
}

case ${1:-} in
    start) start "${2:-}" "${3:-}" ;;
    node) export SLURM_CONF=$(realpath "$2")/slurm.conf && start_node "$(realpath "$2")" "$3" ;;
    stop) stop "${2:-}" ;;
    *) sed -n '2,5s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
