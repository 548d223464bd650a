//! Which processors are near which memory, and running there.

use std::fs;
use std::ops::RangeInclusive;

/// The processors of a NUMA node; none where the system does not say or there is no such node.
pub fn processors(node: u32) -> Option<Vec<usize>> {
    parse(&fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok()?)
}

/// `0-3,8,10-11`
fn parse(list: &str) -> Option<Vec<usize>> {
    let range = |part: &str| -> Option<RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    let ranges: Option<Vec<_>> = list.trim().split(',').map(range).collect();
    Some(ranges?.into_iter().flatten().collect())
}

/// Lets the calling thread run on some processors only; false where there are none or the system refuses.
#[cfg(target_os = "linux")]
pub fn run_on(processors: &[usize]) -> bool {
    // SAFETY: all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let fitting = processors.iter().filter(|&&processor| processor < libc::CPU_SETSIZE as usize);
    // SAFETY: the set has room for each of these.
    fitting.for_each(|&processor| unsafe { libc::CPU_SET(processor, &mut set) });
    // SAFETY: 0 is the calling thread, and the set is as large as said.
    !processors.is_empty() && unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } == 0
}

#[cfg(not(target_os = "linux"))]
pub fn run_on(_: &[usize]) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(parse("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse("5"), Some(vec![5]));
        assert_eq!(parse("\n"), None);
        assert_eq!(parse("a-b"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_stays_where_it_is_put() {
        let allowed = || {
            let status = fs::read_to_string("/proc/thread-self/status").expect("a thread has a status");
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("and a list");
            parse(list).expect("of processors")
        };
        let first = allowed()[0];
        std::thread::spawn(move || {
            assert!(run_on(&[first]));
            assert_eq!(allowed(), [first]);
            assert!(!run_on(&[]));
            assert_eq!(allowed(), [first]);
        })
        .join()
        .expect("the thread ends");
    }
}
