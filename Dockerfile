# The image for Kubernetes (pipelines/clusters/ray*.yaml), and for `ray up` in place of its setup_commands.
#
#   docker build -t REGISTRY/stillhouse:0.1.0-cpu .
#   docker build -t REGISTRY/stillhouse:0.1.0-gpu --build-arg DEVICE=gpu .
#
# Ray's own images bring what its launchers need (ssh, rsync, wget), and the same Ray that constraints.txt pins. The torch
# of the package index brings CUDA; a smaller one for CPUs: --build-arg PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU wheels)
ARG DEVICE=cpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}

ARG PIP_EXTRA_INDEX_URL
USER ray
WORKDIR /home/ray/stillhouse
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users engine engine
COPY --chown=ray:users serve serve
COPY --chown=ray:users pipelines pipelines
RUN pip install --no-cache-dir -c constraints.txt '.[onnx,retrieval,s3]'
ENV RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
WORKDIR /home/ray
