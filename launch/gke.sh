#!/usr/bin/env bash
# Trains on TPU or GPU nodes of a Kubernetes cluster (GKE) as a JobSet. Call it where kubectl is set up, and the cluster
# has the JobSet controller.
#
#   ./launch/gke.sh --name mira --image IMAGE --topology v5e:8x8 [OPTIONS] STAGE CONFIG [--field value ...]
#
#   --name N           of the JobSet
#   --image I          made from launch/Dockerfile and pushed where the cluster can pull it
#   --topology T       as in unichar plan: v5e:8x8, v6e:4x4, v5p:2x2x2, or h100:1x4x8 (slices x hosts x GPUs)
#   --chips N          TPU chips of a host (default: 4)
#   --restarts N       how often the JobSet may start again, after preemptions above all (default: 20)
#   --account A        Kubernetes service account, one that may use the bucket
#   --dry-run          print the manifest and stop
#   --smoke            three steps, save, restore, exit; never started again
#
# Pods share no disk, so give gs:// paths: --run-dir gs://bucket/run --base gs://bucket/model --data.path gs://bucket/data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

takes=(name image topology chips restarts account)
parse_common "$@"
need name && need image && need topology
[[ "${own[name]}" =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] || fail "--name ${own[name]}: expected lower-case letters, digits and -"
: "${own[chips]:=4}" "${own[restarts]:=20}"
number chips && number restarts
[ -z "$smoke" ] || own[restarts]=0

chip="${own[topology]%%:*}" shape="${own[topology]#*:}"
[[ "$shape" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology ${own[topology]}: expected chip:AxB or chip:AxBxC"
devices=$((${shape//x/*}))
case "$chip" in
  v5e) kind=tpu-v5-lite-podslice ;;
  v5p) kind=tpu-v5p-slice ;;
  v6e) kind=tpu-v6e-slice ;;
  h100) kind=nvidia-h100-80gb ;;
  h200) kind=nvidia-h200-141gb ;;
  *) fail "--topology ${own[topology]}: expected v5e, v5p, v6e, h100 or h200" ;;
esac
if [[ "$chip" == v* ]]; then
  each="${own[chips]}"
  [ "$devices" -ge "$each" ] && [ $((devices % each)) -eq 0 ] || fail "--chips $each does not divide the $devices chips of $shape"
  resource=google.com/tpu
  selector="cloud.google.com/gke-tpu-accelerator: $kind
                cloud.google.com/gke-tpu-topology: $shape"
else
  each="${shape##*x}"
  resource=nvidia.com/gpu
  selector="cloud.google.com/gke-accelerator: $kind"
fi
hosts=$((devices / each))

# A YAML string in single quotes.
text() { printf "'%s'" "${1//\'/\'\'}"; }

manifest() {
  local word
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${own[name]}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${own[restarts]}
  replicatedJobs:
    - name: host
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
END
  [ -z "${own[account]:-}" ] || echo "              serviceAccountName: ${own[account]}"
  cat <<END
              nodeSelector:
                $selector
              tolerations:
                - key: $resource
                  operator: Exists
              containers:
                - name: train
                  image: $(text "${own[image]}")
                  args:
END
  for word in "${command[@]:1}" --hosts.cluster flags; do
    echo "                    - $(text "$word")"
  done
  cat <<END
                  env:
                    - name: UNICHAR_COORDINATOR
                      value: ${own[name]}-host-0-0.${own[name]}:8476
                    - name: UNICHAR_NUM_PROCESSES
                      value: '$hosts'
                    - name: UNICHAR_PROCESS_INDEX
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                  ports:
                    - containerPort: 8476
                    - containerPort: 8477
                  resources:
                    limits:
                      $resource: $each
                  volumeMounts:
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: shared-memory
                  emptyDir:
                    medium: Memory
END
}

if [ -n "$dry_run" ]; then
  manifest
  exit 0
fi
manifest | kubectl apply -f -
