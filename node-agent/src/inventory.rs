//! What this machine has: processor, memory, disk, accelerators.

use std::fs;
use std::path::Path;

use freehold_crds::Device;
use freehold_crds::inference_node::{Accelerator, Inventory};

use crate::gpu::GpuSupport;

/// Memory that models never get: the system's and the agent's own share, the larger of an eighth and this.
const SYSTEM_RESERVE_BYTES: u64 = 512 << 20;
const GIB: u64 = 1 << 30;

/// Reads the machine. `data_dir` tells which disk the model store is on; `memory_limit` is the owner's
/// own bound for all models together; `gpu` what the agent can do with accelerators.
#[must_use]
pub fn read(data_dir: &Path, memory_limit: Option<u64>, gpu: &GpuSupport) -> Inventory {
    let memory_bytes = memory_bytes();
    let reserve = SYSTEM_RESERVE_BYTES.max(memory_bytes / 8);
    let allocatable = memory_bytes.saturating_sub(reserve);
    let allocatable_bytes = memory_limit.map_or(allocatable, |limit| limit.min(memory_bytes));
    let (disk_bytes, disk_free) = rustix::fs::statvfs(data_dir)
        .map(|disk| (disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize))
        .unwrap_or((0, 0));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut devices = nvidia_devices();
    devices.extend(apple_device(memory_bytes));
    for device in &mut devices {
        device.usable = gpu.program.is_some();
        device.reason.clone_from(&gpu.reason);
    }
    let cpu = cpu_name();
    let accelerators = devices
        .iter()
        .map(|device| format!("{} {}", device.name, gib(device.memory_bytes)));
    let device_summary = std::iter::once(format!("{cores} cores"))
        .chain(accelerators)
        .collect::<Vec<_>>()
        .join(", ");
    Inventory {
        os: std::env::consts::OS.to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        cpu,
        cores: u32::try_from(cores).unwrap_or(u32::MAX),
        memory_bytes,
        allocatable_bytes,
        memory_summary: Some(format!("{} of {}", gib(allocatable_bytes), gib(memory_bytes))),
        disk_bytes,
        disk_free_bytes: disk_free / GIB * GIB,
        devices,
        device_summary: Some(device_summary),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

/// Installed memory, or the control group's limit where that is lower.
fn memory_bytes() -> u64 {
    let installed = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| meminfo_total(&text));
    let installed = installed.or_else(mac_memory_bytes).unwrap_or(0);
    let limit = crate::cgroup::memory_limit_bytes(Path::new("/"));
    match limit {
        Some(limit) if installed > 0 => installed.min(limit),
        _ => installed,
    }
}

fn meminfo_total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

/// `sysctl hw.memsize`, where there is no /proc.
fn mac_memory_bytes() -> Option<u64> {
    sysctl("hw.memsize")?.parse().ok()
}

fn sysctl(name: &str) -> Option<String> {
    if !cfg!(target_os = "macos") {
        return None;
    }
    let output = std::process::Command::new("/usr/sbin/sysctl")
        .args(["-n", name])
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    field("model name")
        .or_else(|| field("Model"))
        .or_else(|| sysctl("machdep.cpu.brand_string"))
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// NVIDIA GPUs as the driver's own library (NVML) tells them; none where the library is not installed.
fn nvidia_devices() -> Vec<Accelerator> {
    let Ok(nvml) = nvml_wrapper::Nvml::init() else {
        return Vec::new();
    };
    let driver = nvml.sys_driver_version().ok();
    let devices = (0..nvml.device_count().unwrap_or(0)).filter_map(|index| nvml.device_by_index(index).ok());
    devices
        .map(|device| Accelerator {
            kind: Device::Cuda,
            name: device.name().unwrap_or_else(|_| "NVIDIA GPU".to_owned()),
            memory_bytes: device.memory_info().map_or(0, |memory| memory.total),
            driver: driver.clone(),
            ..Accelerator::default()
        })
        .collect()
}

/// The GPU of a Mac with Apple's own processor, which shares the machine's memory.
fn apple_device(memory_bytes: u64) -> Option<Accelerator> {
    let apple = cfg!(all(target_os = "macos", target_arch = "aarch64"));
    apple.then(|| Accelerator {
        kind: Device::Metal,
        name: format!("{} GPU", cpu_name()),
        memory_bytes,
        ..Accelerator::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory_cores_and_a_disk() {
        let inventory = read(Path::new("/"), None, &GpuSupport::default());
        assert!(inventory.memory_bytes > GIB / 2, "{inventory:?}");
        assert!(inventory.allocatable_bytes < inventory.memory_bytes);
        assert!(inventory.cores >= 1 && inventory.disk_bytes > 0);
    }

    #[test]
    fn an_owners_limit_bounds_what_models_may_take() {
        assert_eq!(
            read(Path::new("/"), Some(1 << 20), &GpuSupport::default()).allocatable_bytes,
            1 << 20
        );
    }

    #[test]
    fn meminfo_reads_kibibytes() {
        assert_eq!(
            meminfo_total("MemTotal:       16384 kB\nMemFree: 1 kB"),
            Some(16_777_216)
        );
    }
}
