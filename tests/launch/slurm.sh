#!/bin/bash
# slurm.sh FOLDER PORT: a Slurm of one node on this machine, its files in FOLDER, on PORT and the one after it. The node
# has more processors than the machine, and eight GPUs that are names only, so that the batch file runs as it is.
set -euo pipefail
d=$(realpath -m "$1") h=$(hostname -s)
mkdir -p "$d"/{state,spool}
touch "$d"/gpu{0..7}
cat > "$d/gres.conf" <<C
AutoDetect=off
Name=gpu File=$d/gpu[0-7]
C
cat > "$d/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$h(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort=$2
SlurmdPort=$(($2 + 1))
StateSaveLocation=$d/state
SlurmdSpoolDir=$d/spool
SlurmctldPidFile=$d/slurmctld.pid
SlurmdPidFile=$d/slurmd.pid
SlurmctldLogFile=$d/slurmctld.log
SlurmdLogFile=$d/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$h NodeAddr=127.0.0.1 CPUs=16 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
C
export SLURM_CONF=$d/slurm.conf
slurmctld
slurmd
for _ in $(seq 100); do
  if [ "$(sinfo -h -p all -o %t 2> /dev/null)" = idle ]; then exit 0; fi
  sleep 0.1
done
sinfo >&2
tail -n 20 "$d"/*.log >&2
exit 1
