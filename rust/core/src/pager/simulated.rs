//! A device that exists only to find missing waits: its streams are queues run by a seeded scheduler, which reorders
//! whatever no event forbids, a page at a time.
//!
//! Memory holds one value a page: which page it is and how many updates it has seen. Whatever reads another value than
//! it must, or writes where it must not, is noted as a violation. The caller's compute stream is simulated too, and a
//! stand-in for its allocator poisons freed memory and hands it out again at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::panic::Location;

use crate::error::{Error, Result};
use crate::ops::adamw::{Address, Update};
use crate::pager::{HostMemory, PageDevice, Stream};
use crate::tensor::Device;

/// What freed memory holds.
pub const POISON: u64 = 0xDBDB_DBDB_DBDB_DBDB;
/// Where host memory begins.
const HOST: Address = 1 << 40;

/// The contents of a page after so many updates.
pub fn contents(page: usize, updates: u64) -> u64 {
    (page as u64) << 32 | updates
}

/// A source file's line that calls the device to wait: what a mutation removes.
pub type Site = u32;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Table {
    step: u64,
    pages: Vec<Address>,
    work: Vec<u32>,
}

#[derive(Debug)]
enum Work {
    Record(u64),
    Wait(u64),
    Copy {
        from: Address,
        to: Address,
    },
    ReadTable(usize),
    Update {
        step: u64,
        at: usize,
    },
    /// compute reads a parameter, which has seen so many updates
    Forward {
        page: usize,
        updates: u64,
    },
    /// compute writes a gradient
    Backward {
        page: usize,
        step: u64,
    },
    /// compute uses memory that it owns
    Write {
        address: Address,
        value: u64,
    },
}

/// Seeded streams, memory of pages, and what went wrong.
#[derive(Debug)]
pub struct Simulated {
    random: u64,
    /// the stream that runs only when no other can, for now
    slow: usize,
    page_bytes: usize,
    queues: [VecDeque<Work>; 4],
    done: BTreeSet<u64>,
    events: u64,
    memory: BTreeMap<Address, u64>,
    versions: Vec<Table>,
    table: Option<Table>,
    staged: u64,
    params: Vec<u64>,
    grads: Vec<u64>,
    next_host: Address,
    /// reservations that succeed before one fails
    reservations: usize,
    /// other calls that succeed before one fails
    calls: usize,
    free: Vec<Address>,
    next_frame: Address,
    frame_bytes: usize,
    removed: Option<Site>,
    sites: BTreeSet<Site>,
    violations: Vec<String>,
}

impl Simulated {
    pub fn new(seed: u64, pages: usize, page_bytes: usize, frame_bytes: usize) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d,
            slow: 0,
            page_bytes,
            queues: Default::default(),
            done: BTreeSet::new(),
            events: 0,
            memory: BTreeMap::new(),
            versions: Vec::new(),
            table: None,
            staged: 0,
            params: vec![0; pages],
            grads: vec![POISON; pages],
            next_host: HOST,
            reservations: usize::MAX,
            calls: usize::MAX,
            free: Vec::new(),
            next_frame: frame_bytes as Address,
            frame_bytes,
            removed: None,
            sites: BTreeSet::new(),
            violations: Vec::new(),
        }
    }

    /// Ignores the wait at a site from now on.
    pub fn without(mut self, site: Site) -> Self {
        self.removed = Some(site);
        self
    }

    /// Lets the reservation after `count` fail.
    pub fn failing_after(mut self, count: usize) -> Self {
        self.reservations = count;
        self
    }

    /// Lets the call to the device after `count` fail, and all that follow, as a driver does after a fault.
    pub fn break_after(&mut self, count: usize) {
        self.calls = count;
    }

    fn count(&mut self) -> Result<()> {
        let broken = || Error::Cuda {
            what: "a call".to_string(),
            device: Device::Cpu,
            message: "the simulation says so".to_string(),
        };
        self.calls = self.calls.checked_sub(1).ok_or_else(broken)?;
        Ok(())
    }

    /// The sites that asked to wait.
    pub fn sites(&self) -> &BTreeSet<Site> {
        &self.sites
    }

    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    pub fn versions(&self) -> usize {
        self.versions.len()
    }

    /// A number below `n` (splitmix64).
    pub fn below(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// Memory for a frame, the one freed last if there is any; its contents are whatever was left there.
    pub fn allocate(&mut self) -> Address {
        self.free.pop().unwrap_or_else(|| {
            self.next_frame += self.frame_bytes as Address;
            self.next_frame
        })
    }

    /// The host gives a frame's memory back; anyone may write to it from now on.
    pub fn release(&mut self, frame: Address) {
        for page in 0..self.frame_bytes / self.page_bytes {
            self.memory.insert(frame + (page * self.page_bytes) as Address, POISON);
        }
        self.free.push(frame);
    }

    /// Compute uses a piece of memory and the host frees it at once, as a stream-ordered allocator lets it.
    pub fn scribble(&mut self) {
        let frame = self.allocate();
        for page in 0..self.frame_bytes / self.page_bytes {
            let address = frame + (page * self.page_bytes) as Address;
            self.push(Stream::Compute, Work::Write { address, value: POISON });
        }
        self.free.push(frame);
    }

    /// The parameter whose state is `page` is read by compute, after so many updates.
    pub fn forward(&mut self, page: usize, updates: u64) {
        self.push(Stream::Compute, Work::Forward { page, updates });
    }

    /// Compute makes the gradient that step `step` reads; [`POISON`] stands for whatever replaces a freed gradient.
    pub fn backward(&mut self, page: usize, step: u64) {
        self.push(Stream::Compute, Work::Backward { page, step });
    }

    /// Compute writes a page of lent memory.
    pub fn write(&mut self, address: Address, value: u64) {
        self.push(Stream::Compute, Work::Write { address, value });
    }

    /// The CPU writes a page of host memory at once.
    pub fn poke(&mut self, address: Address, value: u64) {
        self.memory.insert(address, value);
    }

    /// What memory holds now.
    pub fn peek(&self, address: Address) -> u64 {
        self.memory.get(&address).copied().unwrap_or(POISON)
    }

    /// Runs whatever is queued to the end.
    pub fn drain(&mut self) {
        while self.advance() {}
    }

    /// Lets the streams run for a while.
    pub fn run_a_little(&mut self) {
        for _ in 0..self.below(12) {
            self.advance();
        }
    }

    fn push(&mut self, stream: Stream, work: Work) {
        self.queues[stream as usize].push_back(work);
    }

    /// Runs the first of one stream's queue, chosen at random but for the slow one; false when none can run.
    fn advance(&mut self) -> bool {
        if self.below(32) == 0 {
            self.slow = self.below(self.queues.len());
        }
        let runnable = |queue: &VecDeque<Work>| match queue.front() {
            None => false,
            Some(Work::Wait(event)) => self.done.contains(event),
            Some(_) => true,
        };
        let mut ready: Vec<usize> = (0..self.queues.len()).filter(|&i| runnable(&self.queues[i])).collect();
        if ready.is_empty() {
            return false;
        }
        if ready.len() > 1 {
            ready.retain(|&i| i != self.slow);
        }
        let chosen = ready[self.below(ready.len())];
        if let Some(work) = self.queues[chosen].pop_front() {
            self.run(work);
        }
        true
    }

    fn run(&mut self, work: Work) {
        match work {
            Work::Wait(_) => {}
            Work::Record(event) => {
                self.done.insert(event);
            }
            Work::Copy { from, to } => {
                let value = self.peek(from);
                self.memory.insert(to, value);
            }
            Work::ReadTable(version) => self.table = Some(self.versions[version].clone()),
            Work::Update { step, at } => self.update(step, at),
            Work::Forward { page, updates } => {
                let seen = self.params[page];
                self.expect(seen == updates, || format!("forward read param {page} at {seen}, not {updates}"));
            }
            Work::Backward { page, step } => self.grads[page] = step,
            Work::Write { address, value } => {
                self.memory.insert(address, value);
            }
        }
    }

    fn update(&mut self, step: u64, at: usize) {
        let Some(table) = self.table.clone() else {
            return self.violations.push(format!("step {step} has no table"));
        };
        self.expect(table.step == step, || format!("step {step} read the table of {}", table.step));
        let page = table.work[at] as usize;
        let (before, grad) = (self.peek(table.pages[page]), self.grads[page]);
        let (expected, seen) = (contents(page, step - 1), self.params[page]);
        self.expect(before == expected, || format!("step {step} found page {page} at {before:#x}"));
        self.expect(grad == step, || format!("step {step} found the gradient of page {page} at {grad:#x}"));
        self.expect(seen == step - 1, || format!("step {step} found param {page} at {seen}"));
        self.memory.insert(table.pages[page], contents(page, step));
        self.params[page] = step;
    }

    fn expect(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.violations.push(otherwise());
        }
    }

    /// Notes a site that waits; whether its wait is in force.
    fn in_force(&mut self, site: &Location<'_>) -> bool {
        self.sites.insert(site.line());
        self.removed != Some(site.line())
    }
}

impl PageDevice for Simulated {
    type Event = u64;

    fn reserve(&mut self, bytes: usize) -> Result<HostMemory> {
        if self.reservations == 0 {
            let reason = "the simulation says so".to_string();
            return Err(Error::HostMemory { need: bytes as u64, held: 0, available: 0, reason });
        }
        self.reservations -= 1;
        let cpu = self.next_host;
        self.next_host += bytes as Address;
        Ok(HostMemory { cpu, device: cpu })
    }

    fn record(&mut self, stream: Stream) -> Result<u64> {
        self.count()?;
        self.run_a_little();
        self.events += 1;
        self.push(stream, Work::Record(self.events));
        Ok(self.events)
    }

    #[track_caller]
    fn wait(&mut self, stream: Stream, event: &u64) -> Result<()> {
        self.count()?;
        if self.in_force(Location::caller()) {
            self.push(stream, Work::Wait(*event));
        }
        Ok(())
    }

    #[track_caller]
    fn is_done(&mut self, event: &u64) -> Result<bool> {
        self.count()?;
        let in_force = self.in_force(Location::caller());
        self.run_a_little();
        Ok(!in_force || self.done.contains(event))
    }

    #[track_caller]
    fn synchronize(&mut self, event: &u64) -> Result<()> {
        self.count()?;
        if self.in_force(Location::caller()) {
            while !self.done.contains(event) {
                if !self.advance() {
                    self.violations.push(format!("event {event} never comes: the streams wait for each other"));
                    break;
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.count()?;
        for offset in (0..bytes).step_by(self.page_bytes) {
            let (from, to) = (from + offset as Address, to + offset as Address);
            self.push(stream, Work::Copy { from, to });
        }
        Ok(())
    }

    fn stage(&mut self, version: usize, update: &Update<'_>) -> Result<()> {
        self.count()?;
        // The step's number travels where a real update has the address of its clipping factor.
        let table = Table { step: update.grad_scale, pages: update.pages.to_vec(), work: update.work.to_vec() };
        self.staged = table.step;
        if version == self.versions.len() {
            self.versions.push(table);
        } else {
            self.versions[version] = table;
        }
        self.push(Stream::Update, Work::ReadTable(version));
        self.run_a_little();
        Ok(())
    }

    fn launch(&mut self, on_device: Range<usize>, on_host: Range<usize>) -> Result<()> {
        self.count()?;
        let mut pages: Vec<usize> = on_device.chain(on_host).collect();
        while !pages.is_empty() {
            let chosen = self.below(pages.len());
            let at = pages.swap_remove(chosen);
            self.push(Stream::Update, Work::Update { step: self.staged, at });
        }
        self.run_a_little();
        Ok(())
    }
}
