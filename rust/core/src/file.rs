//! Reading a file by all threads: one alone reads the page cache slower than a GPU takes what it has read.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::check::arg;
use crate::error::Result;
use crate::parallel;
use crate::tensor::{DType, Device, TensorMut};

/// A thread reads so many bytes at a time.
const SHARE: usize = 1 << 20;

/// Bytes to be read from a file.
pub struct ReadFile<'a> {
    out: &'a mut [u8],
}

impl<'a> ReadFile<'a> {
    /// out: uint8 on the CPU, any number of elements.
    pub fn new(out: TensorMut<'a>) -> Result<Self> {
        arg("read_file", "out", out.as_ref()).dtype(DType::U8)?.on(Device::Cpu, "the file")?;
        Ok(Self { out: out.into_slice() })
    }

    /// Fills `out` with the bytes of a file from `offset` on; returns how many there were.
    /// An error names the file.
    pub fn run(self, path: &Path, offset: u64) -> io::Result<usize> {
        self.read(path, offset).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }

    fn read(self, path: &Path, offset: u64) -> io::Result<usize> {
        let file = File::open(path)?;
        let (total, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let count = self.out.len().div_ceil(SHARE);
        let shares = self.out.chunks_mut(SHARE).enumerate();
        parallel::for_each(shares, count, |(i, share)| match fill(&file, offset + (i * SHARE) as u64, share) {
            Ok(got) => _ = total.fetch_add(got, Ordering::Relaxed),
            Err(error) => *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(total.into_inner()), Err)
    }
}

/// A read may stop early; 0 bytes say that the file ends.
fn fill(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < out.len() {
        match read_at(file, offset + done as u64, &mut out[done..]) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(path: &Path, offset: u64, out: &mut [u8]) -> io::Result<usize> {
        ReadFile::new(TensorMut::from_slice(out)).unwrap().run(path, offset)
    }

    #[test]
    fn reads_what_is_there_from_any_offset() {
        let path = std::env::temp_dir().join(format!("halfbyte-file-{}", std::process::id()));
        let bytes: Vec<u8> = (0..2 * SHARE + 5).map(|i| (i * 7 + i / 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        for (offset, wanted) in [(0, bytes.len()), (3, SHARE + 1), (SHARE, 0), (10, bytes.len()), (bytes.len() + 9, 4)]
        {
            let mut out = vec![0; wanted];
            let got = read(&path, offset as u64, &mut out).unwrap();
            assert_eq!(got, wanted.min(bytes.len().saturating_sub(offset)));
            assert_eq!(out[..got], bytes[offset.min(bytes.len())..][..got]);
        }
        std::fs::remove_file(&path).unwrap();
        let error = read(&path, 0, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("halfbyte-file-"));
    }
}
