//! The database: its file, its tables, its transactions, and how it comes back after a failed write.
//!
//! redb does the transactions; here is what surrounds them: the first creation (atomic, by rename),
//! the version check, redb's file on our [`Disk`], and reopening after an I/O error, after which redb
//! refuses to go on. What the tables mean is up to the modules that use them.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use redb::{
    BackendError, Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable,
    StorageBackend, TableDefinition, WriteTransaction,
};

use super::disk::{Disk, DiskFile, OpenMode, read_exact};
use super::error::{DatabaseError, Full, IoFault, OpenError, is_full};
use super::rows::Row;

/// Name of the database's file in the store's directory.
pub(super) const META_FILE: &str = "meta.redb";
/// Name under which a new file for the database is prepared.
pub(super) const META_NEW: &str = "meta.redb.new";
/// Newest format of the store that this program reads and writes.
pub(super) const FORMAT: u64 = 1;
/// Memory for the database's pages: rows are small and few, and an idle node must be too.
const CACHE_LEN: usize = 4 << 20;

/// A key that is a hash.
pub(super) type Hash = [u8; 32];
/// A table from hashes to rows.
pub(super) type HashTable = TableDefinition<'static, &'static Hash, &'static [u8]>;

pub(super) const SETTINGS: TableDefinition<&str, u64> = TableDefinition::new("settings");
pub(super) const BLOBS: HashTable = TableDefinition::new("blobs");
pub(super) const SMALL: HashTable = TableDefinition::new("small");
pub(super) const COMPONENTS: HashTable = TableDefinition::new("components");
pub(super) const REACHED: HashTable = TableDefinition::new("reached");
pub(super) const CAPSULES: HashTable = TableDefinition::new("capsules");
pub(super) const PINS: TableDefinition<(&Hash, &str), ()> = TableDefinition::new("pins");
pub(super) const FOLLOWS: TableDefinition<&str, &[u8]> = TableDefinition::new("follows");
pub(super) const BANS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("bans");
pub(super) const RECORDS: HashTable = TableDefinition::new("records");
pub(super) const RECORDS_BY_NAME: TableDefinition<(&str, &Hash), ()> =
    TableDefinition::new("records by name");
pub(super) const RECORDS_BY_TARGET: TableDefinition<(&Hash, &Hash), ()> =
    TableDefinition::new("records by target");
pub(super) const VALUES: TableDefinition<&str, &[u8]> = TableDefinition::new("values");

/// The open database.
pub(super) struct Meta {
    disk: Arc<dyn Disk>,
    /// `None` only after a reopening failed; the next operation tries again.
    database: RwLock<Option<Database>>,
    faults: Arc<Faults>,
}

/// What went wrong on the database's file and was not made good yet.
#[derive(Debug, Default)]
struct Faults {
    /// redb saw an error and refuses to go on: the database must be opened anew.
    any: AtomicBool,
    /// A sync failed: the file itself must be written anew.
    sync: AtomicBool,
}

/// redb's file on our disk.
struct Backend {
    file: Arc<dyn DiskFile>,
    faults: Arc<Faults>,
}

impl Meta {
    /// Opens the database, or makes it; checks the format.
    pub(super) fn open(disk: Arc<dyn Disk>) -> Result<Self, OpenError> {
        match disk.open(Path::new(META_FILE), OpenMode::Existing) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => create(&*disk)?,
            Err(e) => return Err(IoFault::new("open", META_FILE, e).into()),
        }
        let faults = Arc::new(Faults::default());
        let database = open_existing(&*disk, &faults)?;
        let meta = Self {
            disk,
            database: RwLock::new(Some(database)),
            faults,
        };
        let found = meta.read(|tx| {
            Ok(tx
                .open_table(SETTINGS)?
                .get("format")?
                .map_or(0, |v| v.value()))
        })?;
        if found > FORMAT {
            return Err(OpenError::Version {
                found,
                supported: FORMAT,
            });
        }
        Ok(meta)
    }

    /// Runs one read transaction.
    pub(super) fn read<R>(
        &self,
        f: impl FnOnce(&ReadTransaction) -> Result<R, DatabaseError>,
    ) -> Result<R, DatabaseError> {
        let guard = self.healthy()?;
        f(&opened(&guard)?.begin_read()?)
    }

    /// Runs one write transaction; when this returns without error, its effects are durable.
    ///
    /// After an error of the disk during the commit, whether it took effect is only known once the
    /// database has been opened anew.
    pub(super) fn write<R>(
        &self,
        f: impl FnOnce(&WriteTransaction) -> Result<R, DatabaseError>,
    ) -> Result<R, DatabaseError> {
        let guard = self.healthy()?;
        let tx = opened(&guard)?.begin_write()?;
        let result = f(&tx)?;
        tx.commit()?;
        Ok(result)
    }

    /// The open database, after it was opened anew if its file had failed.
    fn healthy(&self) -> Result<RwLockReadGuard<'_, Option<Database>>, DatabaseError> {
        let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
        if guard.is_some() && !self.faults.any.load(Ordering::Acquire) {
            return Ok(guard);
        }
        drop(guard);
        self.reopen()?;
        Ok(self.database.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn reopen(&self) -> Result<(), DatabaseError> {
        let mut guard = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if guard.is_some() && !self.faults.any.load(Ordering::Acquire) {
            return Ok(());
        }
        // The failed one must let go of the file before anything else touches it.
        *guard = None;
        if self.faults.sync.load(Ordering::Acquire) {
            // After a failed sync the kernel may hold pages that look written but never will be: the
            // file as it reads now is good, the file as it lies on the disk may not be. So what reads
            // now is written anew, to a file that can vouch for itself.
            copy(&*self.disk).map_err(of_fault)?;
            self.faults.sync.store(false, Ordering::Release);
        }
        self.faults.any.store(false, Ordering::Release);
        *guard = Some(open_existing(&*self.disk, &self.faults)?);
        Ok(())
    }
}

fn opened(database: &Option<Database>) -> Result<&Database, DatabaseError> {
    let closed = || {
        DatabaseError::Io(io::Error::other(
            "the database is closed after a failure of the disk",
        ))
    };
    database.as_ref().ok_or_else(closed)
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_LEN);
    builder
}

fn open_existing(disk: &dyn Disk, faults: &Arc<Faults>) -> Result<Database, DatabaseError> {
    let file = disk
        .open(Path::new(META_FILE), OpenMode::Existing)
        .map_err(DatabaseError::Io)?;
    open_file(file, faults)
}

fn open_file(file: Arc<dyn DiskFile>, faults: &Arc<Faults>) -> Result<Database, DatabaseError> {
    Ok(builder().create_with_backend(Backend {
        file,
        faults: Arc::clone(faults),
    })?)
}

/// Makes an empty database with all tables under another name, and renames it when it is durable: redb
/// cannot open a file of which a crash left half the first header.
fn create(disk: &dyn Disk) -> Result<(), OpenError> {
    let file = disk
        .open(Path::new(META_NEW), OpenMode::Truncate)
        .map_err(|e| IoFault::new("create", META_NEW, e))?;
    let database = open_file(Arc::clone(&file), &Arc::default())?;
    let tx = database.begin_write().map_err(DatabaseError::from)?;
    create_tables(&tx)?;
    tx.commit().map_err(DatabaseError::from)?;
    drop(database);
    put_in_place(disk, &*file)?;
    Ok(())
}

fn create_tables(tx: &WriteTransaction) -> Result<(), DatabaseError> {
    tx.open_table(SETTINGS)?.insert("format", FORMAT)?;
    for table in [BLOBS, SMALL, COMPONENTS, REACHED, CAPSULES, RECORDS] {
        tx.open_table(table)?;
    }
    tx.open_table(PINS)?;
    tx.open_table(FOLLOWS)?;
    tx.open_table(BANS)?;
    tx.open_table(RECORDS_BY_NAME)?;
    tx.open_table(RECORDS_BY_TARGET)?;
    tx.open_table(VALUES)?;
    Ok(())
}

fn copy(disk: &dyn Disk) -> Result<(), IoFault> {
    let fault = |doing| move |e| IoFault::new(doing, META_NEW, e);
    let from = disk
        .open(Path::new(META_FILE), OpenMode::Existing)
        .map_err(|e| IoFault::new("open", META_FILE, e))?;
    let to = disk
        .open(Path::new(META_NEW), OpenMode::Truncate)
        .map_err(fault("create"))?;
    let len = from.len().map_err(|e| IoFault::new("read", META_FILE, e))?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = &mut buf[..(len - at).min(1 << 20) as usize];
        read_exact(&*from, at, part).map_err(|e| IoFault::new("read", META_FILE, e))?;
        to.write_at(at, &[part]).map_err(fault("write"))?;
        at += part.len() as u64;
    }
    put_in_place(disk, &*to)
}

fn put_in_place(disk: &dyn Disk, file: &dyn DiskFile) -> Result<(), IoFault> {
    let fault = |doing| move |e| IoFault::new(doing, META_NEW, e);
    file.sync().map_err(fault("sync"))?;
    disk.rename(Path::new(META_NEW), Path::new(META_FILE))
        .map_err(fault("rename"))?;
    disk.sync_dir(Path::new(""))
        .map_err(|e| IoFault::new("sync", "", e))
}

fn of_fault(fault: IoFault) -> DatabaseError {
    if is_full(&fault.source) {
        DatabaseError::Full(Full::FileSystem { path: fault.path })
    } else {
        DatabaseError::Io(fault.source)
    }
}

/// Decodes a row, or says which table has a bad one.
pub(super) fn decode<R: Row>(bytes: &[u8]) -> Result<R, DatabaseError> {
    R::decode(bytes).map_err(|_| DatabaseError::Row {
        table: R::TABLE,
        reason: "damaged, or of a newer version",
    })
}

/// All rows of a table by hash.
pub(super) fn rows<R: Row>(
    tx: &ReadTransaction,
    table: HashTable,
) -> Result<Vec<(Hash, R)>, DatabaseError> {
    let mut found = Vec::new();
    for entry in tx.open_table(table)?.iter()? {
        let (key, value) = entry?;
        found.push((*key.value(), decode(value.value())?));
    }
    Ok(found)
}

impl Backend {
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.faults.any.store(true, Ordering::Release);
        }
        result
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.note(self.file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(read_exact(&*self.file, offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let result = self.file.sync();
        if result.is_err() {
            self.faults.sync.store(true, Ordering::Release);
        }
        self.note(result)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(self.file.write_at(offset, &[data]))
    }

    // The store's own lock (see `lock`) keeps other processes out, and one store opens one database.
    fn try_lock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<(), BackendError> {
        Ok(())
    }
}
