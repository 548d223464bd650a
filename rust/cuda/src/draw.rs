use halfbyte_core::Result;
use halfbyte_core::ops::draw::Draw;

use crate::args::args;
use crate::launch::{Family, Geometry, Launcher, extent, family};

pub(crate) static FAMILY: Family = family!("draw", &["draw"]);

pub(crate) const THREADS: u32 = 1024;

pub(crate) fn launch(launcher: &Launcher, args: Draw<'_>) -> Result<()> {
    let (rows, vocab) = (args.tokens.numel(), args.vocab());
    if rows == 0 {
        return Ok(());
    }
    launcher.launch(
        &FAMILY,
        "draw",
        Geometry { grid: (extent(rows), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            args.scores.ptr(),
            args.settings.ptr(),
            args.top_k.ptr(),
            args.keys.ptr(),
            args.positions.ptr(),
            args.tokens.ptr(),
            vocab as i32,
        ],
    )
}
