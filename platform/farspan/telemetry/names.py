"""Every number of a run's events: one name, one unit, one meaning.

`name` is what a metrics endpoint exports (unit as suffix, as Prometheus asks); `source` is the event field it is
read from. Reports and the documentation print this table. What an endpoint counts has its names in serve/metrics.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One number."""

    name: str
    unit: str
    label: str
    source: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("farspan_train_step", "steps", "Step", "step.step", "Optimizer steps done."),
    Metric(
        "farspan_train_loss_nats",
        "nats",
        "Loss",
        "step.loss",
        "Mean over all labels of the step, smoothing and z-loss included.",
    ),
    Metric("farspan_train_learning_rate", "1", "Learning rate", "step.learning_rate", "Of this step."),
    Metric("farspan_train_grad_norm", "1", "Gradient norm", "step.grad_norm", "Global L2 norm before clipping."),
    Metric("farspan_train_tokens", "tokens", "Tokens", "step.tokens", "Tokens of the step, over all ranks."),
    Metric("farspan_train_labels", "labels", "Labels", "step.num_labels", "Tokens that had a label."),
    Metric("farspan_train_step_seconds", "s", "Step time", "step.step_s", "Wall time of the step."),
    Metric("farspan_train_tokens_per_second", "tokens/s", "Throughput", "step.tokens_per_s", "Tokens over wall time."),
    Metric("farspan_train_peak_memory_bytes", "bytes", "Peak memory", "step.peak_memory_bytes", "Of the fullest rank."),
    Metric(
        "farspan_train_sent_bytes", "bytes", "Bytes sent", "step.bytes_sent", "By all ranks, to exchange attention."
    ),
    Metric(
        "farspan_train_device_bytes",
        "bytes",
        "Device memory",
        "step.device_bytes",
        "Of the fullest rank: peak of the step on CUDA, resident on a CPU.",
    ),
    Metric("farspan_train_dram_bytes", "bytes", "DRAM held", "step.dram_bytes", "By pools, arenas and optimizer."),
    Metric("farspan_train_cxl_bytes", "bytes", "CXL held", "step.cxl_bytes", "By pools and arenas."),
    Metric(
        "farspan_train_emulated_cxl_bytes",
        "bytes",
        "CXL (emulated) held",
        "step.emulated_cxl_bytes",
        "By pools and arenas.",
    ),
    Metric("farspan_train_nvme_bytes", "bytes", "NVMe held", "step.nvme_bytes", "By pools."),
    Metric(
        "farspan_train_exposed_seconds",
        "s",
        "Exposed communication",
        "step.exposed_s",
        "Waited for other ranks with nothing to compute; mean over ranks.",
    ),
    Metric(
        "farspan_train_exposed_max_seconds",
        "s",
        "Exposed communication, worst rank",
        "step.exposed_max_s",
        "The same of the rank that waited longest.",
    ),
    Metric("farspan_train_model_flops", "operations", "Useful work", "step.model_flops", "Without recomputation."),
    Metric("farspan_train_utilization", "1", "Utilization", "step.utilization", "Useful work over the devices' peak."),
    Metric(
        "farspan_restarted_step", "steps", "Restarted after", "run_restarted.step", "Where a run goes on after a loss."
    ),
    Metric("farspan_restarts", "1", "Restarts", "run_restarted.restarts", "After losses, since the driver began."),
    Metric("farspan_redone_steps", "steps", "Steps done again", "run_restarted.redone", "After a loss."),
    Metric("farspan_preempted_step", "steps", "Stopped after", "run_preempted.step", "With a checkpoint."),
    Metric("farspan_resized_step", "steps", "Resized after", "run_resized.step", "With another number of workers."),
    Metric("farspan_train_workers", "workers", "Workers", "run_resized.workers", "Since the last change of size."),
    Metric(
        "farspan_train_accumulation", "sequences", "Accumulation", "run_resized.accumulation", "Since the last change."
    ),
    Metric(
        "farspan_checkpoint_step",
        "steps",
        "Checkpoint step",
        "checkpoint_published.step",
        "Steps the checkpoint holds.",
    ),
    Metric(
        "farspan_checkpoint_seconds", "s", "Checkpoint time", "checkpoint_published.seconds", "Gather, write, publish."
    ),
    Metric("farspan_checkpoint_bytes", "bytes", "Checkpoint size", "checkpoint_published.bytes", "Of all its files."),
    Metric(
        "farspan_probe_step", "steps", "Probed step", "layout_probed.step", "Steps done when the layout was probed."
    ),
    Metric("farspan_probe_seconds", "s", "Probe time", "layout_probed.seconds", "Wall time of the probe."),
    Metric("farspan_predicted_step_seconds", "s", "Predicted step", "plan_predicted.step_s", "By the planner."),
    Metric(
        "farspan_predicted_device_bytes",
        "bytes",
        "Predicted memory",
        "plan_predicted.device_bytes",
        "Tensors on the fullest rank, by the planner; 0 where it does not say.",
    ),
    Metric(
        "farspan_stepped_down_step", "steps", "Step that did not fit", "plan_stepped_down.step", "Memory ran out in it."
    ),
    Metric("farspan_run_steps", "steps", "Steps of the run", "run_finished.steps", "Optimizer steps of the run."),
    Metric("farspan_run_tokens", "tokens", "Tokens of the run", "run_finished.tokens", "Tokens the run trained on."),
    Metric("farspan_run_seconds", "s", "Run time", "run_finished.seconds", "Wall time from first to last event."),
    Metric(
        "farspan_request_prompt_tokens", "tokens", "Prompt", "request_served.prompt_tokens", "Tokens of the prompt."
    ),
    Metric(
        "farspan_request_output_tokens", "tokens", "Output", "request_served.output_tokens", "Tokens of the answer."
    ),
    Metric(
        "farspan_request_ttft_seconds", "s", "Time to first token", "request_served.ttft_s", "Arrival to first token."
    ),
    Metric(
        "farspan_request_inter_token_seconds",
        "s",
        "Inter-token latency",
        "request_served.inter_token_s",
        "Gap between two output tokens.",
    ),
    Metric(
        "farspan_request_kv_bytes", "bytes", "KV moved", "request_served.kv_bytes", "KV pages sent, prefill to decode."
    ),
    Metric(
        "farspan_request_transfer_seconds",
        "s",
        "KV transfer",
        "request_served.transfer_s",
        "Wait for KV pages once their prompt is computed.",
    ),
)


def metric(source: str) -> Metric:
    """The metric read from an event field, for example `step.loss`."""
    return next(m for m in METRICS if m.source == source)
