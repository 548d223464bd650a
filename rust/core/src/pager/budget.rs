//! Host memory of the pager: how much there may be, and one piece of it.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapMut, MmapOptions};

use crate::error::{Error, Result};
use crate::ops::adamw::Address;
use crate::pager::numa;

/// Share of what is available that the pager may take.
const SHARE: f64 = 0.8;
/// Threads that touch fresh memory.
const TOUCHERS: usize = 4;
const SMALL_PAGE: usize = 4096;

/// Bytes of host memory that may be reserved now, by the machine's free memory and the limits of the process's
/// control groups; none where the system does not say.
pub fn host_budget() -> Option<u64> {
    let free = read("/proc/meminfo").and_then(|text| mem_available(&text));
    let limited = read("/proc/self/cgroup").and_then(|text| group_headroom(Path::new("/sys/fs/cgroup"), &text));
    let available = [free, limited].into_iter().flatten().min()?;
    Some((available as f64 * SHARE) as u64)
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `MemAvailable:  123 kB` of /proc/meminfo, in bytes.
fn mem_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// The smallest of limit - use over the groups that `/proc/self/cgroup` names, and their parents.
fn group_headroom(root: &Path, text: &str) -> Option<u64> {
    let mut least = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, used) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.current"),
            "memory" => (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
            _ => continue,
        };
        for group in root.join(path.trim_start_matches('/')).ancestors().take_while(|group| group.starts_with(&root)) {
            let number = |name| read(group.join(name))?.trim().parse::<u64>().ok();
            if let (Some(limit), Some(used)) = (number(limit), number(used)) {
                let headroom = limit.saturating_sub(used);
                least = Some(least.map_or(headroom, |least: u64| least.min(headroom)));
            }
        }
    }
    least
}

/// Zeroed host memory of this process alone, present from the start.
#[derive(Debug)]
pub struct Extent {
    memory: MmapMut,
    near: bool,
}

impl Extent {
    /// `held`: what the pager has already; `limit`: most bytes that it may have in all, where the caller sets one;
    /// `node`: the NUMA node whose memory is wanted, if there is a choice.
    pub fn reserve(bytes: usize, held: usize, limit: Option<u64>, node: Option<u32>) -> Result<Self> {
        let allowed = limit.map(|limit| limit.saturating_sub(held as u64));
        let available = [allowed, host_budget()].into_iter().flatten().min().unwrap_or(u64::MAX);
        let fail = |reason: String| Error::HostMemory { need: bytes as u64, held: held as u64, available, reason };
        if bytes as u64 > available {
            return Err(fail("there is no room for it".to_string()));
        }
        let mut memory = MmapOptions::new().len(bytes).map_anon().map_err(|error| fail(error.to_string()))?;
        #[cfg(target_os = "linux")]
        for advice in [memmap2::Advice::HugePage, memmap2::Advice::DontFork] {
            // Huge pages are quicker to pin, and a fork that copied pinned memory would break it; both only help.
            let _ = memory.advise(advice);
        }
        let near = touch(&mut memory, node);
        Ok(Self { memory, near })
    }

    /// Whether it was taken from the node that was asked for, as far as that node had memory.
    pub fn is_near(&self) -> bool {
        self.near
    }

    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    pub fn address(&self) -> Address {
        self.memory.as_ptr().expose_provenance() as Address
    }
}

/// Makes every page present, so that pinning need not, by threads that run on `node`: a page comes from the memory of
/// the processor that touches it first. Whether they all could run there.
fn touch(memory: &mut [u8], node: Option<u32>) -> bool {
    let processors = node.and_then(numa::processors).unwrap_or_default();
    let near = AtomicBool::new(!processors.is_empty());
    let part = memory.len().div_ceil(TOUCHERS).max(SMALL_PAGE);
    std::thread::scope(|scope| {
        for part in memory.chunks_mut(part) {
            scope.spawn(|| {
                near.fetch_and(numa::run_on(&processors), Ordering::Relaxed);
                part.iter_mut().step_by(SMALL_PAGE).for_each(|byte| *byte = std::hint::black_box(0));
            });
        }
    });
    near.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_in_bytes() {
        assert_eq!(mem_available("MemTotal:  8 kB\nMemAvailable:    1024 kB\n"), Some(1 << 20));
        assert_eq!(mem_available("MemTotal:  8 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_counts() -> std::io::Result<()> {
        let root = std::env::temp_dir().join(format!("halfbyte-groups-{}", std::process::id()));
        let write = |group: &str, limit: &str, used: &str| {
            fs::create_dir_all(root.join(group))?;
            fs::write(root.join(group).join("memory.max"), limit)?;
            fs::write(root.join(group).join("memory.current"), used)
        };
        write("a/b", "max\n", "10\n")?;
        write("a", "1000\n", "400\n")?;
        write("", "5000\n", "400\n")?;
        assert_eq!(group_headroom(&root, "1:cpu:/x\n0::/a/b\n"), Some(600));
        assert_eq!(group_headroom(&root, "0::/elsewhere\n"), Some(4600));
        fs::remove_dir_all(&root)
    }

    #[test]
    fn too_much_is_refused_in_words() {
        let error = Extent::reserve(1 << 20, 1 << 20, Some(3 << 19), None).map(|_| ()).expect_err("too much");
        let text = error.to_string();
        assert!(text.contains("1048576 bytes") && text.contains("524288"), "{text}");
        assert!(Extent::reserve(1 << 20, 0, Some(1 << 20), None).is_ok());
    }
    #[test]
    fn memory_is_there_whatever_node_is_asked_for() {
        for node in [None, Some(0), Some(9999)] {
            let extent = Extent::reserve(3 << 20, 0, None, node).expect("there is memory");
            assert_eq!(extent.bytes(), 3 << 20);
            assert!(!extent.is_near() || node == Some(0));
        }
    }
}
