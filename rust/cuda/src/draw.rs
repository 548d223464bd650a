use halfbyte_core::Result;
use halfbyte_core::ops::draw::Draw;

use crate::args::{aligned, args, dtype_index};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 3] = ["draw_f32", "draw_f16", "draw_bf16"];
pub(crate) static FAMILY: Family = family!("draw", &KERNELS);

pub(crate) const THREADS: u32 = 1024;

pub(crate) fn launch(launcher: &Launcher, args: Draw<'_>) -> Result<()> {
    let (scores, choice, vocab) = (args.scores, args.choice, args.vocab());
    let (rows, drawn) = (args.drawn.tokens.numel(), args.drawn);
    if rows == 0 {
        return Ok(());
    }
    launcher.launch_1d(
        &FAMILY,
        KERNELS[dtype_index(scores.dtype())],
        rows,
        THREADS,
        args![
            scores.ptr(),
            choice.settings.ptr(),
            choice.top_k.ptr(),
            choice.keys.ptr(),
            choice.running.ptr(),
            drawn.lengths.ptr(),
            drawn.tokens.ptr(),
            drawn.reported.ptr(),
            vocab as i32,
            vocab.is_multiple_of(8) && aligned(scores, 16),
        ],
    )
}
