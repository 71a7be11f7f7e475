# The one list of commands. `just` shows it.

default:
    @just --list

# Set up what the tests need and pass them (the README's second command, and CI's)
test *ARGS:
    ./tests/run {{ARGS}}

# The whole way on this machine (the README's first command)
demo *ARGS:
    cargo run --release --bin freehold -- demo {{ARGS}}

# Write the CustomResourceDefinitions from the types
crds:
    cargo run --quiet -p freehold-crds --bin crdgen -- crds/yaml
    cargo run --quiet -p freehold-crds --bin crdgen -- charts/freehold/files/crds

# What a reviewer would say by machine
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets

# That the code for NVIDIA GPUs compiles: fetches CUDA's compiler from PyPI (1.2 GiB) where it is not yet there
check-cuda *ARGS:
    tests/cuda/with-toolkit.sh cargo check -p freehold-engine -p freehold-node-agent --features freehold-engine/cuda,freehold-node-agent/cuda {{ARGS}}

# The agent whose workers run on NVIDIA GPUs (for --gpu-worker); runs where a driver and CUDA 13's libraries are
build-cuda:
    tests/cuda/with-toolkit.sh cargo build --release -p freehold-node-agent --features cuda --target-dir target/cuda

# Licences, advisories, sources and doubles of the dependencies
deny:
    cargo deny --version || cargo install --locked cargo-deny
    cargo deny check

# Every crate compiles alone
each:
    for dir in crds crds/rules operator/control-plane node-agent/engine node-agent/gateway operator node-agent cli; do (cd $dir && cargo check --quiet) || exit 1; done

# The engine beside candle-transformers: prefill, decode, batches, memory
bench-engine:
    cargo run --release -p freehold-engine --example bench_engine -- "${XDG_CACHE_HOME:-$HOME/.cache}/freehold/models/SmolLM2-135M-Instruct.Q4_1.gguf"

# Memory and write rate of the all-in-one at rest, time to Ready, time to the first token
bench-rest *ARGS:
    cargo build --release --bin freehold
    python3 tests/bench_rest.py {{ARGS}}

# Freehold beside llama.cpp on the same files; writes docs/benchmarks.md when the machine is quiet
bench-peers *ARGS:
    cargo build --release --bin freehold
    python3 tests/peers/run.py {{ARGS}}

# The kernels by themselves, at every level of this processor: products of each format, rounding, attention
bench-kernels:
    cargo test -p freehold-engine --lib -- --ignored --nocapture --test-threads 1 pace_of

# One model on this machine: `just bench-model FILE --http`
bench-model FILE *ARGS:
    cargo run --release --bin freehold -- bench {{FILE}} {{ARGS}}

# Half an hour of random arrivals, lengths, cancels and disconnects; every answer equal to its answer alone
soak SECONDS="1800":
    FREEHOLD_SOAK_SECONDS={{SECONDS}} cargo test --workspace --test soak -- --nocapture

# Greedy answers beside candle-transformers, token by token: all the tests' prompts, of SmolLM2 or of another llama's FILE
oracle FILE="" TOKENS="64":
    FREEHOLD_TEST_TOKENS={{TOKENS}} {{ if FILE == "" { "" } else { "FREEHOLD_TEST_ORACLE_FILE=" + FILE } }} cargo test --workspace --test oracle -- --nocapture

# Fuzzers of model files, templates, texts and requests, SECONDS each; what they find lies in tests/fuzz/artifacts
fuzz SECONDS="300":
    tests/fuzz/run {{SECONDS}}

# Decoding with and without guesses, on text that repeats and text that does not; REST: answers at once, temperature, and
# a model that guesses
bench-speculation MODEL RUNS="5" *REST:
    cargo run --release -p freehold-engine --example bench_speculation -- {{MODEL}} {{RUNS}} {{REST}}

# What following a schema costs while decoding
bench-constrained MODEL RUNS="5" TEMPERATURE="0" TOP_P="0" TOP_K="0":
    cargo run --release -p freehold-engine --example bench_constrained -- {{MODEL}} {{RUNS}} {{TEMPERATURE}} {{TOP_P}} {{TOP_K}}

# Write what the kustomize base installs: the chart's default values, rendered
manifests HELM="helm":
    {{HELM}} template freehold charts/freehold --namespace freehold-system --no-hooks --set crds.install=false > manifests/base/freehold.yaml

# Decoding with thousands of tokens before it, beside llama.cpp
bench-context *ARGS:
    cargo build --release --bin freehold
    python3 tests/peers/context.py {{ARGS}}

# Perplexity of one text under Freehold and llama.cpp, for each kind of weights
perplexity *ARGS:
    cargo build --release --bin freehold
    python3 tests/peers/perplexity.py {{ARGS}}

# The chart's images on a real cluster of this machine's own, and what befalls them (root, Linux, twenty minutes)
e2e:
    tests/e2e

# The same in three minutes
e2e-short:
    tests/e2e short

# The kernels of 64-bit ARM on emulated processors
test-arm:
    tests/arm

# The API suites, the chart, operator and agent on the cluster that KUBECONFIG names, such as your k3s
on-cluster *ARGS:
    tests/on-cluster {{ARGS}}
