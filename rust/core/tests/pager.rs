//! The pager's rules on the simulated device: random interleavings, and every wait removed in turn.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use halfbyte_core::ops::adamw::{AdamwScalars, Address, Moments, PAGE_ELEMENTS, Slab, Target};
use halfbyte_core::pager::simulated::{POISON, Simulated, Site, contents};
use halfbyte_core::pager::{CpuPages, Pager};
use halfbyte_core::{Result, TensorMut};
use rayon::prelude::*;

const PAGES: usize = 7;
const PAGES_PER_FRAME: usize = 2;
const ACTIONS: usize = 24;
const PAGE_BYTES: usize = Moments::Block8.page_bytes();

/// A training run that moves its state about. One parameter a page, so that each can be followed.
struct Run {
    pager: Pager<Simulated>,
    lent: Vec<Option<Address>>,
    steps: u64,
    overlapped: bool,
}

impl Run {
    fn new(device: Simulated) -> Self {
        let slab = Slab::new(Moments::Block8, &[PAGE_ELEMENTS; PAGES]).unwrap();
        let pager = Pager::with_pages_per_frame(device, slab, true, PAGES_PER_FRAME).unwrap();
        let lent = vec![None; pager.frames().len()];
        let mut run = Self { pager, lent, steps: 0, overlapped: false };
        run.write_state();
        run
    }

    fn device(&mut self) -> &mut Simulated {
        self.pager.device()
    }

    fn below(&mut self, n: usize) -> usize {
        self.device().below(n)
    }

    /// Address of each page, and whether it is on the device.
    fn places(&self) -> Vec<(Address, bool)> {
        let of = |(lent, frame): (&Option<Address>, &halfbyte_core::pager::Frame<u64>)| {
            let base = if frame.on_device() { lent.unwrap() } else { frame.host().unwrap().cpu };
            let place = move |i: usize| base + (i * PAGE_BYTES) as Address;
            let on_device = frame.on_device();
            (0..frame.pages().len()).map(move |i| (place(i), on_device)).collect::<Vec<_>>()
        };
        self.lent.iter().zip(self.pager.frames()).flat_map(of).collect()
    }

    /// The caller loads a state: slots by the CPU, lent memory by compute.
    fn write_state(&mut self) {
        self.pager.settle().unwrap();
        let steps = self.steps;
        for (page, (address, on_device)) in self.places().into_iter().enumerate() {
            if on_device {
                self.device().write(address, contents(page, steps));
            } else {
                self.device().poke(address, contents(page, steps));
            }
        }
        self.pager.rewritten().unwrap();
    }

    /// The caller saves the state; compute reads lent memory, in its own order.
    fn snapshot(&mut self) {
        self.pager.settle().unwrap();
        let steps = self.steps;
        for (page, (address, _)) in self.places().into_iter().enumerate() {
            let found = self.device().peek(address);
            assert!(found == contents(page, steps), "a snapshot found page {page} at {found:#x}");
        }
    }

    fn step(&mut self) {
        let (steps, overlapped) = (self.steps, self.overlapped);
        for page in 0..PAGES {
            if overlapped {
                self.pager.wait_for(page).unwrap();
            }
            self.device().forward(page, steps);
        }
        for page in 0..PAGES {
            self.device().backward(page, steps + 1);
        }
        self.steps += 1;
        self.overlapped = self.below(2) == 0;
        let targets = targets();
        // SAFETY: the simulation touches no memory of ours.
        unsafe { self.pager.step(&targets, self.steps, self.overlapped) }.unwrap();
        let waited = if self.overlapped { self.below(2) * self.below(PAGES) } else { PAGES };
        for page in 0..waited {
            // A gradient is freed, and its memory used again, after compute has waited for the update.
            self.pager.wait_for(page).unwrap();
            self.device().backward(page, POISON);
        }
    }

    fn demote(&mut self) {
        let frame = self.below(self.lent.len());
        let state = &self.pager.frames()[frame];
        if state.on_device() && !state.is_leaving() {
            self.pager.demote(frame).unwrap();
        }
    }

    fn take_back(&mut self, wait: bool) {
        let frames = self.pager.take_back(wait).unwrap();
        assert!(!wait || self.pager.frames().iter().all(|frame| !frame.is_leaving()), "memory was kept back");
        for frame in frames {
            let memory = self.lent[frame].take().unwrap();
            self.device().release(memory);
        }
    }

    fn promote(&mut self) {
        let frame = self.below(self.lent.len());
        let state = &self.pager.frames()[frame];
        if !state.on_device() && !state.is_leaving() {
            let memory = self.device().allocate();
            self.lent[frame] = Some(memory);
            // SAFETY: the simulation touches no memory of ours.
            unsafe { self.pager.promote(frame, memory) }.unwrap();
        }
    }

    fn act(&mut self) {
        match self.below(12) {
            0..4 => self.step(),
            4..6 => self.promote(),
            6..8 => self.demote(),
            8 => self.take_back(false),
            9 => self.take_back(true),
            10 => self.device().scribble(),
            _ if self.below(2) == 0 => self.snapshot(),
            _ => self.write_state(),
        }
        self.device().run_a_little();
        let violations = self.device().violations();
        assert!(violations.is_empty(), "{violations:?}");
    }

    fn finish(mut self) -> BTreeSet<Site> {
        self.snapshot();
        self.device().drain();
        let violations = self.device().violations();
        assert!(violations.is_empty(), "{violations:?}");
        self.device().sites().clone()
    }
}

/// No simulated update reads more of them than their number.
fn targets() -> Vec<Target> {
    let scalars = AdamwScalars { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let target = || Target::new(TensorMut::from_slice(&mut [0f32; 0]), None, &scalars, Moments::Block8).unwrap();
    (0..PAGES).map(|_| target()).collect()
}

fn simulated(seed: u64) -> Simulated {
    Simulated::new(seed, PAGES, PAGE_BYTES, PAGES_PER_FRAME * PAGE_BYTES)
}

fn interleaving(device: Simulated) -> BTreeSet<Site> {
    let mut run = Run::new(device);
    for _ in 0..ACTIONS {
        run.act();
    }
    run.finish()
}

#[test]
fn no_interleaving_breaks_the_state() {
    (0..100_000).into_par_iter().for_each(|seed| {
        interleaving(simulated(seed));
    });
}

/// Whether any of some interleavings goes wrong without the wait of a site.
fn is_missed(site: Site) -> bool {
    let survives = |seed| std::panic::catch_unwind(|| interleaving(simulated(seed).without(site))).is_ok();
    (0..2_000).any(|seed| !survives(seed))
}

#[test]
fn every_wait_is_needed() {
    let sites: BTreeSet<Site> = (0..50).flat_map(|seed| interleaving(simulated(seed))).collect();
    assert_eq!(sites.len(), 10, "{sites:?}");
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let useless: Vec<Site> = sites.into_iter().filter(|&site| !is_missed(site)).collect();
    std::panic::set_hook(hook);
    assert!(useless.is_empty(), "nothing fails without the waits of pager.rs at lines {useless:?}");
}

#[test]
fn versions_do_not_pile_up() {
    let mut run = Run::new(simulated(1));
    for _ in 0..200 {
        run.step();
        run.device().drain();
    }
    assert!(run.device().versions() <= 2);
}

#[test]
fn a_reservation_that_fails_is_an_error_at_once() {
    let slab = Slab::new(Moments::Fp32, &[PAGE_ELEMENTS; 600]).unwrap();
    for calls in 0..3 {
        let device = simulated(0).failing_after(calls);
        let error = Pager::new(device, slab.clone(), true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("bytes of host memory are needed"), "{error}");
    }
    let pager = Pager::new(simulated(0).failing_after(3), slab, true).unwrap();
    assert_eq!(pager.frames().len(), 19);
    assert_eq!(pager.frames().iter().map(|frame| frame.pages().len()).sum::<usize>(), 600);
}

/// Two steps about moves of every frame; memory that came back is poisoned at once.
fn there_and_back(run: &mut Run) -> Result<()> {
    for overlapped in [false, true] {
        for page in 0..PAGES {
            let (steps, device) = (run.steps, run.device());
            device.forward(page, steps);
            device.backward(page, steps + 1);
        }
        run.steps += 1;
        let (targets, steps) = (targets(), run.steps);
        // SAFETY: the simulation touches no memory of ours.
        unsafe { run.pager.step(&targets, steps, overlapped) }?;
        for frame in 0..run.lent.len() {
            let memory = run.device().allocate();
            run.lent[frame] = Some(memory);
            // SAFETY: as above.
            unsafe { run.pager.promote(frame, memory) }?;
        }
        for frame in 0..run.lent.len() {
            run.pager.demote(frame)?;
        }
        for frame in run.pager.take_back(true)? {
            let memory = run.lent[frame].take().unwrap();
            run.device().release(memory);
        }
    }
    run.pager.settle()
}

#[test]
fn a_failure_of_any_call_is_an_error_and_leaves_memory_that_came_back_alone() {
    let mut failures = 0;
    for seed in 0..20 {
        for calls in 0.. {
            let mut run = Run::new(simulated(seed));
            run.device().break_after(calls);
            let done = there_and_back(&mut run);
            run.device().drain();
            let violations = run.device().violations();
            assert!(violations.is_empty(), "after {calls} calls: {violations:?}");
            match done {
                Ok(()) => break,
                Err(error) => assert!(error.to_string().contains("the simulation says so"), "{error}"),
            }
            failures += 1;
        }
    }
    assert!(failures > 20 * 60, "{failures}");
}

#[test]
fn what_cannot_move_is_refused() {
    let slab = || Slab::new(Moments::Fp32, &[10]).unwrap();
    let mut pager = Pager::new(CpuPages::new(None), slab(), true).unwrap();
    assert!(pager.demote(0).unwrap_err().to_string().contains("a frame on the device"));
    let mut memory = vec![0u64; pager.frame_bytes(0) / 8];
    let address = memory.as_mut_ptr().expose_provenance() as Address;
    // SAFETY: the memory holds a frame and outlives the pager's use of it.
    unsafe {
        pager.promote(0, address).unwrap();
        assert!(pager.promote(0, address).unwrap_err().to_string().contains("a frame in host memory"));
        assert!(pager.step(&[], 0, false).unwrap_err().to_string().contains("must have 1 elements"));
    }
    pager.demote(0).unwrap();
    assert_eq!(pager.take_back(false).unwrap(), [0]);
    let mut resident = Pager::new(CpuPages::new(None), slab(), false).unwrap();
    // SAFETY: as above.
    unsafe { resident.lend(0, address) }.unwrap();
    assert!(resident.demote(0).unwrap_err().to_string().contains("slot in host memory"));
}
