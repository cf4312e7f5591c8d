# The packages of the pipeline and the repository as it stands; README.md says how to build and run it.
# Debian's whole image: DVC needs its git, torch.compile on a GPU its C compiler, `make test` its make.
FROM python:3.11-bookworm

# cpu, or cuda: the ordinary wheels, some gigabytes larger
ARG TORCH=cpu

WORKDIR /repo
# Whoever runs it may not keep what Python compiles, and would wait for it at every start.
ENV UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir uv
COPY pyproject.toml requirements.txt ./
RUN case "$TORCH" in \
    cpu) uv pip install --system --no-cache --torch-backend cpu -r pyproject.toml -c requirements.txt ;; \
    cuda) uv pip install --system --no-cache -r requirements.txt ;; \
    *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 1 ;; \
    esac

# With `docker run --user` whoever owns a mounted clone runs it: one who has no home and no name in here.
ENV HOME=/tmp USER=ddpm
RUN useradd ddpm && chown ddpm /repo && git config --system safe.directory /repo
COPY --chown=ddpm . .
USER ddpm
CMD ["dvc", "repro"]
