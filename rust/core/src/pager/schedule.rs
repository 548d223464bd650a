//! Which frames move.

/// The fewest of `frames` (index, bytes) on the device that free `bytes`, the last of the slab first: their update
/// comes last in a step. All of them if that is not enough.
pub fn victims(frames: &[(usize, usize)], bytes: usize) -> Vec<usize> {
    let mut freed = 0;
    let taken = frames.iter().rev().take_while(|(_, size)| {
        let wanted = freed < bytes;
        freed += size;
        wanted
    });
    taken.map(|(index, _)| *index).collect()
}

/// The most of `frames` (index, bytes) in host memory that fit into `bytes`, the first of the slab first.
pub fn returners(frames: &[(usize, usize)], bytes: usize) -> Vec<usize> {
    let mut used = 0;
    let taken = frames.iter().take_while(|(_, size)| {
        used += size;
        used <= bytes
    });
    taken.map(|(index, _)| *index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: [(usize, usize); 4] = [(0, 10), (2, 10), (3, 10), (5, 4)];

    #[test]
    fn the_last_frames_go_first_and_no_more_than_needed() {
        assert_eq!(victims(&FRAMES, 0), [0; 0]);
        assert_eq!(victims(&FRAMES, 4), [5]);
        assert_eq!(victims(&FRAMES, 5), [5, 3]);
        assert_eq!(victims(&FRAMES, 1000), [5, 3, 2, 0]);
    }

    #[test]
    fn the_first_frames_return_while_they_fit() {
        assert_eq!(returners(&FRAMES, 9), [0; 0]);
        assert_eq!(returners(&FRAMES, 29), [0, 2]);
        assert_eq!(returners(&FRAMES, 34), [0, 2, 3, 5]);
    }
}
