//! What a chain costs a reader: the same disk as one file and as the top of sixteen.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use benchmarks::{Row, median};
use blockio::BlockDevice;
use vhdx::{Builder, ChildSpec, HostFiles, Image, ParentResolver, Spec, create_child};

use crate::load::{Random, drive_for, noise};
use crate::{Failure, MIB, create, file, new_file};

const DISK_BYTES: u64 = 256 * MIB;
const LAYERS: usize = 16;
/// Pieces of 64 KiB that each layer has of its own.
const PIECES: u64 = 100;
const PIECE: u64 = 64 << 10;

/// The folder, through which parents are found.
struct Chain<'a>(&'a Path);

impl Chain<'_> {
    fn path(&self, layer: usize) -> String {
        self.0.join(format!("layer{layer}.vhdx")).to_str().expect("paths of a benchmark are UTF-8").to_owned()
    }

    fn resolver(&self) -> ParentResolver {
        ParentResolver::new(Arc::new(HostFiles { direct: true })).root(self.0.to_str().expect("UTF-8"))
    }

    fn builder(&self, layer: usize) -> Result<Builder, Failure> {
        let path = self.path(layer);
        Ok(Builder::open(file(Path::new(&path))?).parents(self.resolver(), &path))
    }

    fn image(&self, layer: usize) -> Result<Image, Failure> {
        Ok(self.builder(layer)?.read_only()?)
    }

    fn add(&self, layer: usize) -> Result<(), Failure> {
        let (path, parent) = (self.path(layer), self.path(layer - 1));
        let spec = ChildSpec::new(self.resolver().paths(&path, &parent)?);
        create_child(&*new_file(Path::new(&path))?, &self.image(layer - 1)?, &spec)?;
        let disk = self.builder(layer)?.writable()?;
        let (mut random, piece) = (Random(layer as u64), noise(PIECE).to_vec());
        for _ in 0..PIECES {
            disk.write_at(random.next() % (DISK_BYTES / PIECE) * PIECE, &piece)?;
        }
        disk.close()?;
        Ok(())
    }
}

/// Random reads of a full disk alone, and with fifteen layers over it.
pub(crate) fn reads(dir: &Path, rounds: usize) -> Result<Vec<Row>, Failure> {
    let chain = Chain(dir);
    let base = create(Path::new(&chain.path(0)), &Spec::dynamic(DISK_BYTES))?;
    let piece = noise(MIB).to_vec();
    for at in 0..DISK_BYTES / MIB {
        base.write_at(at * MIB, &piece)?;
    }
    base.close()?;
    drop(base);
    (1..LAYERS).try_for_each(|layer| chain.add(layer))?;
    let images = [chain.image(0)?, chain.image(LAYERS - 1)?];
    let mut figures = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for side in [round % 2, 1 - round % 2] {
            let device: &dyn BlockDevice = &images[side];
            figures[side].push(drive_for(device, 32, false, DISK_BYTES, Duration::from_millis(400))?);
        }
    }
    let [mut base, mut ours] = figures;
    for layer in 0..LAYERS {
        std::fs::remove_file(chain.path(layer))?;
    }
    // A cost of 1.3 times is a rate of 0.77.
    let name = "4 KiB random read, depth 32".into();
    Ok(vec![Row { name, base: median(&mut base), ours: median(&mut ours), goal: 1.0 / 1.3 }])
}
