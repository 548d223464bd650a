//! What can be known of the kernels without a GPU. A build without kernels has nothing to check and passes.

use halfbyte_core::codebook::{
    DYNAMIC_SIGNED, FP4, FP4_RANKS, INT4, INT4_RANKS, NEAREST_UNSIGNED, NF4, NF4_RANKS, encode_first_moment,
    encode_grid, encode_nearest,
};

use halfbyte_core::DType;
use halfbyte_core::ops::gemv_4bit_fused::MAX_NORMED;
use halfbyte_core::quant_state::QuantType;

use crate::launch::Family;

struct Sources {
    family: &'static Family,
    cuda: &'static str,
    ptxas: &'static str,
}

macro_rules! sources {
    ($($name:ident),+) => {
        &[$(Sources {
            family: &crate::$name::FAMILY,
            cuda: include_str!(concat!(stringify!($name), ".cu")),
            ptxas: include_str!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".ptxas")),
        }),+]
    };
}

static SOURCES: &[Sources] = sources!(
    adamw,
    cross_entropy,
    dequantize_4bit,
    dequantize_blockwise,
    double_quantize,
    draw,
    gemm_4bit,
    gemv_4bit,
    gemv_4bit_bulk,
    gemv_4bit_mma,
    gemv_4bit_shifted,
    lora_product,
    low_rank,
    paged_attention,
    paged_attention_bulk,
    paged_attention_mma,
    quantize_4bit,
    quantize_blockwise,
    rms_norm,
    rope,
    swiglu
);

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle.as_bytes())
}

#[test]
fn every_kernel_is_in_its_image() {
    for Sources { family, .. } in SOURCES.iter().filter(|_| crate::build_info().is_some()) {
        for kernel in family.kernels {
            assert!(contains(&family.image.0, &format!(".text.{kernel}\0")), "{kernel}");
        }
    }
}

#[test]
fn images_are_empty_only_without_kernels() {
    for Sources { family, .. } in SOURCES {
        assert_eq!(family.image.0.is_empty(), crate::build_info().is_none(), "{}", family.name);
        assert_eq!(family.image.0.as_ptr().addr() % 16, 0, "{}", family.name);
    }
}

/// ptxas reports every kernel once for each target of machine code.
#[test]
fn no_kernel_spills_or_uses_local_memory() {
    let archs = crate::build_info().map_or(Vec::new(), |info| info.archs);
    let machine_code = archs.iter().filter(|arch| !arch.starts_with("compute_")).count();
    for Sources { family, ptxas, .. } in SOURCES {
        let frames: Vec<&str> = ptxas.lines().filter(|line| line.contains("bytes stack frame")).collect();
        assert_eq!(frames.len(), family.kernels.len() * machine_code, "{}", family.name);
        let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        assert!(frames.iter().all(|frame| frame.trim() == clean), "{}\n{ptxas}", family.name);
    }
}

/// Most threads of a CTA with which a kernel is launched.
fn threads(family: &str, kernel: &str) -> usize {
    let of_warps = |warps| 32 * warps;
    match family {
        "adamw" => crate::adamw::THREADS as usize,
        "cross_entropy" => crate::cross_entropy::THREADS as usize,
        "dequantize_4bit" => crate::dequantize_4bit::THREADS as usize,
        "dequantize_blockwise" => crate::dequantize_blockwise::THREADS as usize,
        "double_quantize" => crate::double_quantize::THREADS as usize,
        "draw" => crate::draw::THREADS as usize,
        "gemm_4bit" => crate::gemm_4bit::threads_of(kernel),
        "gemv_4bit" if kernel.contains("any") => of_warps(crate::gemv_4bit::ANY_WARPS),
        "gemv_4bit" => of_warps(crate::gemv_4bit::MAX_WARPS),
        "gemv_4bit_bulk" => crate::gemv_4bit_bulk::threads_of(kernel),
        "gemv_4bit_mma" => of_warps(crate::gemv_4bit_mma::MAX_WARPS),
        "gemv_4bit_shifted" => of_warps(crate::gemv_4bit_shifted::MAX_WARPS),
        "lora_product" => crate::lora_product::THREADS,
        "low_rank" => crate::low_rank::THREADS,
        "paged_attention" | "paged_attention_mma" => of_warps(crate::paged_attention::WARPS),
        "paged_attention_bulk" => crate::paged_attention_bulk::THREADS,
        "quantize_4bit" => crate::quantize_4bit::THREADS as usize,
        "quantize_blockwise" => crate::quantize_blockwise::THREADS as usize,
        "rms_norm" => crate::rms_norm::MAX_THREADS,
        "rope" => crate::rope::THREADS as usize,
        "swiglu" => crate::swiglu::THREADS as usize,
        other => panic!("{other}: how many threads?"),
    }
}

/// Each kernel of a report with its registers a thread and its bytes of static shared memory, once a target.
fn resources(ptxas: &str) -> Vec<(&str, usize, usize)> {
    let number = |line: &str, unit: &str| {
        let before = line.split(unit).next().filter(|before| before.len() < line.len());
        before.and_then(|before| before.split(' ').next_back()?.parse().ok())
    };
    let mut kernel = "";
    let mut found = Vec::new();
    for line in ptxas.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            kernel = name.split('\'').next().unwrap_or(name);
        } else if let Some(registers) = number(line, " registers") {
            found.push((kernel, registers, number(line, " bytes smem").unwrap_or(0)));
        }
    }
    found
}

/// A multiprocessor has 65536 registers, which warps get eight a thread at a time.
#[test]
fn a_cta_of_every_kernel_fits_a_multiprocessor() {
    for Sources { family, ptxas, .. } in SOURCES {
        let frames = ptxas.matches("bytes stack frame").count();
        let found = resources(ptxas);
        assert_eq!(found.len(), frames, "{}", family.name);
        for (kernel, registers, shared) in found {
            let threads = threads(family.name, kernel);
            assert!(registers.next_multiple_of(8) * threads <= 65536, "{kernel}: {registers} of {threads} threads");
            assert!(shared <= 48 << 10, "{kernel}: {shared} bytes of shared memory");
        }
    }
    let asked = crate::gemm_4bit::TILES.map(|tile| tile.shared + crate::gemm_4bit::ALIGNMENT);
    let asked = asked.into_iter().chain(crate::gemv_4bit_bulk::FORMS.map(|form| form.shared_with_norm(MAX_NORMED)));
    let asked = asked.chain([crate::lora_product::SHARED + crate::gemm_4bit::ALIGNMENT]);
    assert!(asked.max() <= Some(227 << 10), "more than compute capability 9.0 gives a CTA");
}

/// The value of `constexpr <type> <name> = <number>;`.
fn constant(source: &str, name: &str) -> Option<usize> {
    let (_, rest) = source.split_once(&format!(" {name} = "))?;
    rest.split_once(';')?.0.parse().ok()
}

#[test]
fn launchers_and_kernels_agree_on_their_geometry() {
    let expected = [
        ("adamw", "THREADS", crate::adamw::THREADS as usize),
        ("adamw", "BLOCK", halfbyte_core::ops::adamw::BLOCK),
        ("adamw", "BLOCKS_PER_PAGE", halfbyte_core::ops::adamw::BLOCKS_PER_PAGE),
        ("adamw", "SLICE", crate::adamw::SLICE),
        ("adamw", "CTAS", crate::adamw::CTAS_PER_MULTIPROCESSOR),
        ("cross_entropy", "THREADS", crate::cross_entropy::THREADS as usize),
        ("cross_entropy", "FEW", crate::cross_entropy::FEW as usize),
        ("dequantize_4bit", "THREADS", crate::dequantize_4bit::THREADS as usize),
        ("dequantize_4bit", "GROUPS", crate::dequantize_4bit::GROUPS),
        ("dequantize_blockwise", "THREADS", crate::dequantize_blockwise::THREADS as usize),
        ("dequantize_blockwise", "PER_THREAD", crate::dequantize_blockwise::PER_THREAD),
        ("double_quantize", "THREADS", crate::double_quantize::THREADS as usize),
        ("double_quantize", "SHARE", crate::double_quantize::SHARE),
        ("double_quantize", "CTAS", crate::double_quantize::CTAS),
        ("double_quantize", "CHUNK", halfbyte_core::ops::double_quantize::MEAN_CHUNK),
        ("double_quantize", "LANES", halfbyte_core::ops::double_quantize::MEAN_LANES),
        ("double_quantize", "NESTED", halfbyte_core::quant_state::NESTED_BLOCKSIZE),
        ("draw", "THREADS", crate::draw::THREADS as usize),
        ("draw", "SHARE_BITS", halfbyte_core::ops::draw::SHARE_BITS as usize),
        ("draw", "WEIGHT_BITS", halfbyte_core::ops::draw::WEIGHT_BITS as usize),
        ("gemv_4bit", "MAX_WARPS", crate::gemv_4bit::MAX_WARPS),
        ("gemv_4bit", "UNIT", crate::gemv_4bit::UNIT),
        ("gemv_4bit", "CODES", crate::gemv_4bit::ANY_WARPS),
        ("gemv_4bit", "ANY_ROWS_A_WARP", crate::gemv_4bit::ANY_ROWS / crate::gemv_4bit::ANY_WARPS),
        ("gemv_4bit_mma", "MAX_WARPS", crate::gemv_4bit_mma::MAX_WARPS),
        ("gemv_4bit_mma", "MAX_CHUNK", crate::gemv_4bit_mma::MAX_CHUNK),
        ("gemv_4bit_shifted", "MAX_WARPS", crate::gemv_4bit_shifted::MAX_WARPS),
        ("gemv_4bit_shifted", "BLOCK", crate::gemv_4bit_shifted::BLOCK),
        ("lora_product", "ROWS", crate::lora_product::ROWS),
        ("lora_product", "COLUMNS", crate::lora_product::COLUMNS),
        ("lora_product", "THREADS", crate::lora_product::THREADS),
        ("lora_product", "STEP", crate::lora_product::STEP),
        ("lora_product", "BAND", crate::lora_product::BAND),
        ("low_rank", "CTAS", crate::low_rank::CTAS),
        ("low_rank", "TILE", crate::low_rank::TILE),
        ("low_rank", "MAX_ADAPTERS", crate::low_rank::MAX_ADAPTERS),
        ("paged_attention", "PER_LANE", crate::paged_attention::PER_LANE),
        ("paged_attention_bulk", "CHUNK", crate::paged_attention_bulk::CHUNK),
        ("paged_attention_bulk", "PARTS", crate::paged_attention_bulk::PARTS),
        ("paged_attention_mma", "HEADS", crate::paged_attention_mma::HEADS),
        ("quantize_4bit", "THREADS", crate::quantize_4bit::THREADS as usize),
        ("quantize_4bit", "CTAS", crate::quantize_4bit::CTAS),
        ("quantize_blockwise", "THREADS", crate::quantize_blockwise::THREADS as usize),
        ("rms_norm", "MAX_THREADS", crate::rms_norm::MAX_THREADS),
        ("rms_norm", "HELD_BYTES", crate::rms_norm::HELD_BYTES),
        ("rms_norm", "STRIP", crate::rms_norm::STRIP),
        ("rope", "THREADS", crate::rope::THREADS as usize),
        ("rope", "WIDTH", crate::rope::WIDTH),
        ("swiglu", "THREADS", crate::swiglu::THREADS as usize),
        ("swiglu", "WIDTH", crate::swiglu::WIDTH),
    ];
    let table = include_str!("pair_table.cuh");
    assert_eq!(constant(table, "TABLE"), Some(crate::gemv_4bit_mma::TABLE));
    for (name, dtype) in [("NF4_GAIN", DType::BF16), ("NF4_GAIN<f16>", DType::F16)] {
        let (_, gain) = crate::gemv_4bit_bulk::codebook(QuantType::Nf4, dtype);
        assert!(table.contains(&format!("float {name} = {gain}f;")), "{name} = {gain}");
    }
    let panel = include_str!("panel.cuh");
    assert_eq!(constant(panel, "PANEL"), Some(crate::gemv_4bit_mma::PANEL));
    assert_eq!(constant(panel, "TILE"), Some(crate::gemv_4bit_mma::TILE));
    assert_eq!(constant(panel, "LINE"), Some(crate::gemv_4bit_mma::LINE));
    let tiles = include_str!("tiles.cuh");
    assert_eq!(constant(tiles, "LINE"), Some(crate::gemm_4bit::LINE));
    assert_eq!(constant(tiles, "MAX_PARTS"), Some(crate::gemm_4bit::MAX_PARTS));
    assert_eq!(constant(tiles, "MAX_SPLITS"), Some(crate::gemm_4bit::MAX_SPLITS));
    let products = include_str!("products.cuh");
    assert_eq!(constant(products, "MAX_PARTS"), Some(crate::gemv_4bit_bulk::MAX_PARTS));
    assert_eq!(constant(products, "PANEL"), Some(crate::gemv_4bit_bulk::PANEL));
    assert_eq!(constant(products, "MAX_RANK"), Some(halfbyte_core::ops::gemv_4bit_fused::MAX_RANK));
    assert_eq!(constant(products, "CHUNK"), Some(halfbyte_core::ops::gemv_4bit_fused::CHUNK));
    let max_adapted_rows = halfbyte_core::ops::gemv_4bit_fused::MAX_ADAPTED_ROWS;
    assert_eq!(constant(include_str!("bulk.cuh"), "MMA_ROWS"), Some(max_adapted_rows));
    assert_eq!(constant(include_str!("bulk_hidden.cuh"), "FEW_ROWS"), Some(crate::gemv_4bit_bulk::FEW_ROWS));
    let low_rank = include_str!("low_rank.cuh");
    assert_eq!(constant(low_rank, "RANKS"), Some(halfbyte_core::ops::gemv_4bit_fused::RANKS));
    let shared = include_str!("paged_attention.cuh");
    assert_eq!(constant(shared, "WARPS"), Some(crate::paged_attention::WARPS));
    assert_eq!(constant(shared, "BLOCK"), Some(halfbyte_core::ops::paged_attention::BLOCK));
    assert_eq!(constant(shared, "MAX_PARTS"), Some(halfbyte_core::ops::paged_attention::MAX_PARTS));
    for (family, name, value) in expected {
        let source = SOURCES.iter().find(|sources| sources.family.name == family);
        assert_eq!(source.and_then(|source| constant(source.cuda, name)), Some(value), "{family}: {name}");
    }
}

/// One row of a table of the printed headers.
fn printed<T>(name: &str, row: usize, number: impl Fn(&str) -> T) -> Vec<T> {
    let header = concat!(
        include_str!(concat!(env!("OUT_DIR"), "/codebook.cuh")),
        include_str!(concat!(env!("OUT_DIR"), "/entry_tables.cuh"))
    );
    let (_, table) = header.split_once(name).expect("the table is printed");
    let numbers = table.split('{').nth(2 + row).and_then(|row| row.split('}').next()).expect("the row is printed");
    numbers.split(',').map(|text| number(text.trim())).collect()
}

fn row(name: &str, row: usize) -> Vec<f32> {
    printed(name, row, |text| match text {
        "__builtin_huge_valf()" => f32::INFINITY,
        text => text.trim_end_matches('f').parse().expect("a number"),
    })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn the_device_reads_the_same_codebooks() {
    for (i, table) in [NF4, FP4, INT4].iter().enumerate() {
        assert_eq!(bits(&row("CODEBOOK_4BIT", i)), bits(table));
    }
    assert_eq!(bits(&row("THRESHOLDS_4BIT", 0)[..15]), bits(&NF4_RANKS.thresholds));
    assert_eq!(bits(&row("THRESHOLDS_4BIT", 1)[..15]), bits(&FP4_RANKS.thresholds));
    assert_eq!(row("THRESHOLDS_4BIT", 2)[14], f32::INFINITY);
    assert_eq!(row("ORDER_4BIT", 1), FP4_RANKS.order.map(f32::from));
    assert_eq!(bits(&row("DYNAMIC_MAP", 1)), bits(&DYNAMIC_SIGNED));
    assert_eq!(bits(&row("NEAREST_THRESHOLDS", 0)), bits(&NEAREST_UNSIGNED));
}

/// As of entries.cuh.
fn lowered(x: f32) -> u32 {
    let y = f64::from(x) * 2f64.powi(-103);
    let y = if y.abs() < f64::from(f32::MIN_POSITIVE) { 0.0f32.copysign(x) } else { y as f32 };
    y.to_bits()
}

/// As the device does it: a code is the top byte of a sum.
#[test]
fn one_read_finds_a_code() {
    let entries = |name| printed(name, 0, |text| text.parse::<u32>().expect("a number"));
    let [first, second, grid] = ["FIRST_MOMENT_ENTRIES", "SECOND_MOMENT_ENTRIES", "GRID_ENTRIES"].map(entries);
    let code = |entry: u32, bits: u32, shift: u32| (entry.wrapping_add(bits << (24 - shift)) >> 24) as u8;
    let signed = |entries: &[u32], x: f32| {
        let bits = lowered(x);
        let ordered = bits ^ (bits as i32 >> 31) as u32;
        code(entries[(ordered >> 17 & 0xfff) as usize], ordered, 17)
    };
    let unsigned = |x: f32| code(second[(lowered(x) >> 16) as usize], lowered(x), 16);

    let near = |x: f32| [x.next_down(), x, x.next_up()];
    let thresholds = [0, 1].map(|i| row("NEAREST_THRESHOLDS", i)).concat().into_iter().flat_map(near);
    let steps = (0..=65536).map(|step| (step as f32 - 0.5) / 32767.5 - 1.0).flat_map(near);
    let leading_bits = (0..=1.0f32.to_bits() >> 9).map(|bits| f32::from_bits(bits << 9));
    let values = thresholds.chain(steps).chain(leading_bits).chain([f32::from_bits(1), 2f32.powi(-25)]);
    for x in values.map(f32::abs).filter(|&x| x <= 1.0f32.next_up()).flat_map(|x| [x, -x]) {
        assert_eq!(signed(&first, x + 0.0), encode_first_moment(x), "{x:e}");
        assert_eq!(signed(&grid, (x + 1.0) - 1.0), encode_grid(x), "{x:e}");
        assert_eq!(unsigned(x.abs().min(1.0)), encode_nearest(false, x.abs()), "{x:e}");
    }
}

/// As the device does it: the part of [-1, 1] is computed loosely, one comparison decides.
#[test]
fn one_comparison_is_left_in_a_part_of_the_range() {
    for (i, ranks) in [(0, &NF4_RANKS), (2, &INT4_RANKS)] {
        let (thresholds, codes) = (row("BIN_THRESHOLDS_4BIT", i), row("BIN_CODES_4BIT", i));
        let near = ranks.thresholds.iter().flat_map(|t| [t.next_down(), *t, t.next_up()]);
        let edges = (0..=30).map(|edge| edge as f32 / 15.0 - 1.0).flat_map(|e| [e - 1e-4, e, e + 1e-4]);
        let grid = (-100_000..=100_000).map(|step| step as f32 / 1e5);
        for x in near.chain(edges).chain(grid).filter(|x| x.abs() <= 1.000001) {
            let bin = (f64::from(x) * f64::from(14.9999f32) + 15.0).floor() as usize;
            let above = if x > thresholds[bin] { 1 } else { 0 };
            assert_eq!((codes[bin] as u32 & 15) as u8 + above, ranks.encode(x), "{x}");
            let steep = 2f64.powi(60);
            let clamped = (f64::from(x) * steep - f64::from(thresholds[bin]) * steep).clamp(0.0, 1.0);
            assert_eq!(clamped, f64::from(above), "{x}");
        }
    }
}

#[test]
fn status_says_why_not_without_a_driver() {
    if let Err(reason) = crate::status() {
        assert!(reason.contains("CUDA") || reason.contains("NVIDIA"), "{reason}");
        assert!(crate::CudaBackend::new(0, 0).is_err());
    }
}
