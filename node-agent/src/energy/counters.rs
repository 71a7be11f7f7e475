//! The counters themselves: RAPL of processors, as Linux shows it under powercap, and NVML of NVIDIA GPUs.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use freehold_crds::Device;
use nvml_wrapper::Nvml;

/// Microjoules in a joule, the unit of powercap.
const MICRO: f64 = 1e-6;
/// Millijoules in a joule (and milliwatts in a watt), the unit of NVML.
const MILLI: f64 = 1e-3;

/// All counters of a machine.
pub(super) struct Meter {
    zones: Vec<Zone>,
    nvml: Option<Nvml>,
    gpus: Vec<Gpu>,
    /// Why there is none, or one less than the machine has.
    pub(super) reason: Option<String>,
}

/// One domain of RAPL.
struct Zone {
    name: String,
    path: PathBuf,
    /// The counter begins again after this; None where that is not told.
    range: Option<u64>,
    last: Option<u64>,
}

/// One GPU.
struct Gpu {
    index: u32,
    name: String,
    /// The latest reading: the counter in millijoules, where the GPU has one, and when.
    last: Option<(Option<u64>, Instant)>,
}

impl Meter {
    /// Finds the counters. `powercap` is the kernel's folder of them.
    pub(super) fn open(powercap: &Path) -> Self {
        let (zones, reason) = zones(powercap);
        let nvml = Nvml::init().ok();
        let gpus = nvml.iter().flat_map(|nvml| {
            (0..nvml.device_count().unwrap_or(0)).filter_map(|index| {
                let name = nvml.device_by_index(index).ok()?.name();
                let name = name.unwrap_or_else(|_| "NVIDIA GPU".to_owned());
                let gpu = Gpu {
                    index,
                    name,
                    last: None,
                };
                Some(gpu)
            })
        });
        let gpus = gpus.collect();
        Self {
            zones,
            nvml,
            gpus,
            reason,
        }
    }

    /// Names of what is read.
    pub(super) fn names(&self) -> Vec<String> {
        let zones = self.zones.iter().map(|zone| zone.name.clone());
        zones
            .chain(self.gpus.iter().map(|gpu| gpu.name.clone()))
            .collect()
    }

    /// Devices that something is known of.
    pub(super) fn devices(&self) -> Vec<Device> {
        let cpu = (!self.zones.is_empty()).then_some(Device::Cpu);
        let cuda = (!self.gpus.is_empty()).then_some(Device::Cuda);
        cpu.into_iter().chain(cuda).collect()
    }

    /// Joules since the call before; nothing at the first.
    pub(super) fn read(&mut self) -> BTreeMap<Device, f64> {
        let mut joules = BTreeMap::new();
        for zone in &mut self.zones {
            if let Some(drawn) = zone.read() {
                *joules.entry(Device::Cpu).or_default() += drawn;
            }
        }
        if let Some(nvml) = &self.nvml {
            for gpu in &mut self.gpus {
                if let Some(drawn) = gpu.read(nvml) {
                    *joules.entry(Device::Cuda).or_default() += drawn;
                }
            }
        }
        joules
    }
}

/// The domains that together are the processors and their memory: each package, and DRAM, which the package
/// does not hold. Cores are within the package; `psys` and `intel-rapl-mmio` would count it twice.
fn zones(powercap: &Path) -> (Vec<Zone>, Option<String>) {
    let mut names: Vec<PathBuf> = fs::read_dir(powercap)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    // Beside the kernel's class folder stands the tree itself, where domains lie within their packages.
    let inner = names
        .iter()
        .filter(|path| is_zone(path))
        .filter_map(|path| fs::read_dir(path).ok());
    let inner: Vec<PathBuf> = inner.flatten().flatten().map(|entry| entry.path()).collect();
    names.extend(inner);
    names.retain(|path| is_zone(path));
    names.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    names.dedup_by(|a, b| a.file_name() == b.file_name());
    let (mut zones, mut denied) = (Vec::new(), None);
    for path in names {
        let Ok(name) = fs::read_to_string(path.join("name")) else {
            continue;
        };
        let name = name.trim();
        if !name.starts_with("package") && name != "dram" {
            continue;
        }
        let counter = path.join("energy_uj");
        match fs::read_to_string(&counter) {
            Ok(_) => zones.push(Zone {
                name: name.to_owned(),
                range: number(&path.join("max_energy_range_uj")),
                path: counter,
                last: None,
            }),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => denied = Some(counter),
            Err(_) => {}
        }
    }
    let reason = match denied {
        Some(counter) => Some(format!(
            "the kernel lets only root read {}: run the agent as root, or give it CAP_DAC_READ_SEARCH",
            counter.display()
        )),
        None if zones.is_empty() => Some(format!(
            "the processor shows no energy counter (RAPL) under {}; virtual machines and most ARM boards have none",
            powercap.display()
        )),
        None => None,
    };
    (zones, reason)
}

fn is_zone(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("intel-rapl:"))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl Zone {
    fn read(&mut self) -> Option<f64> {
        let now = number(&self.path)?;
        let last = self.last.replace(now)?;
        let drawn = match self.range {
            _ if now >= last => now - last,
            // It began again, at most once: a round takes minutes at full load, and readings are seconds apart.
            Some(range) if range >= last => range - last + now,
            _ => return None,
        };
        Some(drawn as f64 * MICRO)
    }
}

impl Gpu {
    fn read(&mut self, nvml: &Nvml) -> Option<f64> {
        let device = nvml.device_by_index(self.index).ok()?;
        let now = Instant::now();
        let counter = device.total_energy_consumption().ok();
        let (last, at) = self.last.replace((counter, now))?;
        match (counter, last) {
            (Some(counter), Some(last)) => Some(counter.checked_sub(last)? as f64 * MILLI),
            // Before Volta there is no counter: the power at this moment stands for the interval.
            _ => Some(f64::from(device.power_usage().ok()?) * MILLI * (now - at).as_secs_f64()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A powercap folder with a package, its cores and memory, and the platform as a whole.
    pub(in crate::energy) fn powercap(energy: [u64; 2]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (zone, name) in [
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ] {
            fs::create_dir(folder.path().join(zone)).expect("made");
            write(&folder, zone, "name", name);
            write(&folder, zone, "max_energy_range_uj", "1000000000");
            write(&folder, zone, "energy_uj", "7");
        }
        set(&folder, energy);
        folder
    }

    /// Sets package and memory, in microjoules.
    pub(in crate::energy) fn set(folder: &tempfile::TempDir, [package, memory]: [u64; 2]) {
        write(folder, "intel-rapl:0", "energy_uj", &package.to_string());
        write(folder, "intel-rapl:0:1", "energy_uj", &memory.to_string());
    }

    fn write(folder: &tempfile::TempDir, zone: &str, file: &str, text: &str) {
        fs::write(folder.path().join(zone).join(file), format!("{text}\n")).expect("written");
    }

    #[test]
    fn packages_and_memory_are_counted_once() {
        let folder = powercap([5_000_000, 1_000_000]);
        let mut meter = Meter::open(folder.path());
        assert_eq!(meter.names()[..2], ["package-0", "dram"]);
        assert_eq!(meter.reason, None);
        assert!(
            meter.read().is_empty(),
            "the first reading is where counting begins"
        );
        set(&folder, [9_000_000, 1_500_000]);
        assert_eq!(meter.read().get(&Device::Cpu), Some(&4.5));
    }

    #[test]
    fn a_counter_that_begins_again_loses_nothing() {
        let folder = powercap([999_000_000, 0]);
        let mut meter = Meter::open(folder.path());
        meter.read();
        set(&folder, [2_000_000, 0]);
        assert_eq!(meter.read().get(&Device::Cpu), Some(&3.0));
        // Without a known range a counter that goes back tells nothing, and the next interval is whole again.
        fs::remove_file(folder.path().join("intel-rapl:0/max_energy_range_uj")).expect("removed");
        let mut meter = Meter::open(folder.path());
        meter.read();
        set(&folder, [1_000_000, 0]);
        assert_eq!(meter.read().get(&Device::Cpu), Some(&0.0), "of the memory alone");
        set(&folder, [3_000_000, 0]);
        assert_eq!(meter.read().get(&Device::Cpu), Some(&2.0));
    }

    #[test]
    fn a_machine_without_counters_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let meter = Meter::open(&folder.path().join("none"));
        assert!(meter.reason.expect("a reason").contains("no energy counter"));
        assert!(meter.zones.is_empty());
    }

    /// Root reads everything, so the test drops to what a plain user may where it runs as root.
    #[test]
    fn a_counter_that_may_not_be_read_is_told_with_what_to_do() {
        use std::os::unix::fs::PermissionsExt;
        let folder = powercap([1, 1]);
        let denied = fs::Permissions::from_mode(0o000);
        fs::set_permissions(folder.path().join("intel-rapl:0/energy_uj"), denied).expect("set");
        let meter = Meter::open(folder.path());
        if rustix::process::geteuid().is_root() {
            assert_eq!(meter.zones.len(), 2, "root may read it");
        } else {
            assert_eq!(meter.zones.len(), 1);
            assert!(meter.reason.expect("a reason").contains("CAP_DAC_READ_SEARCH"));
        }
    }

    /// The folder of the kernel's own tree, which a container gets where its class folder is masked.
    #[test]
    fn domains_within_their_package_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let package = folder.path().join("intel-rapl:0");
        for (path, name) in [
            (package.clone(), "package-0"),
            (package.join("intel-rapl:0:2"), "dram"),
        ] {
            fs::create_dir_all(&path).expect("made");
            fs::write(path.join("name"), name).expect("written");
            fs::write(path.join("energy_uj"), "1").expect("written");
        }
        assert_eq!(Meter::open(folder.path()).zones.len(), 2);
    }
}
